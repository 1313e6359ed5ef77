"""Launch configs of cca-attention for Acme's GPUs: data only, in the folder `profiles`."""
