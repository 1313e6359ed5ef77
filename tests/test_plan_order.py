"""How well a model ordered what was timed, from a run's record."""

from __future__ import annotations

from typing import Any

import pytest

from cca_attention.autotune.plan_quality import plan_quality, spearman


def test_a_plan_is_as_good_as_its_order() -> None:
    def kernel(*pairs: tuple[float | None, float | None]) -> dict[str, Any]:
        return {"trials": [{"predicted_us": p, "time_us": t, "refusal": None} for p, t in pairs]}

    good = plan_quality(kernel((1, 10), (2, 20), (3, 30), (None, 1), (0.5, None)))
    assert good is not None and (good.configs, good.correlation, good.regret) == (3, 1.0, 1.0)
    bad = plan_quality(kernel((3, 10), (2, 20), (1, 30)))
    assert bad is not None and (bad.correlation, bad.regret) == (-1.0, 3.0)
    assert plan_quality(kernel((1, 1), (2, 2))) is None
    out = kernel((1, 10), (2, 20), (3, 30), (0.1, 99))
    out["trials"][-1]["refusal"] = "wrong"
    assert plan_quality(out) == good


def test_rank_correlation() -> None:
    assert spearman([1, 2, 2, 3], [10, 20, 20, 90]) == pytest.approx(1)
    assert spearman([1, 1, 1], [1, 2, 3]) == 0
    # by hand: squared differences of ranks sum to 8, 1 - 6*8/(5*24)
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 5, 3]) == pytest.approx(1 - 6 * 8 / 120)
