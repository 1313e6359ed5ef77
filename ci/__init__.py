"""What gates a change."""
