"""Why a run chose what it chose, what differs between two runs, and what another search would have chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..kernels.tunable import Config
from ..profiles.configs import as_config
from ..profiles.live import minor_version
from .keys import config_fields
from .plan_quality import plan_quality
from .race import BAND, MARGIN, Round, ranking
from .record import RecordError
from .report import config_text, time_text
from .strategies import STRATEGIES, Space

Kernel = Mapping[str, Any]
SHOWN = 5


def explanation(record: Mapping[str, Any], names: tuple[str, ...] = ()) -> Iterator[str]:
    """Lines that explain each kernel's choice for each problem; `names`: these kernels alone."""
    for run in record["runs"]:
        problem = run["problem"]
        yield f"{record['device']}, {problem['seq_len']} tokens, {record['evidence']}"
        for name, kernel in run["kernels"].items():
            if not names or name in names:
                yield from _explained(name, kernel)


def _explained(name: str, kernel: Kernel) -> Iterator[str]:
    legal, refused = kernel["legal"], kernel["refused"]
    yield f"{name}: {legal} of {legal + refused} configs are legal, {kernel['compiled']} were compiled"
    if kernel["chosen"] is None:
        yield f"  nothing was chosen: {kernel['trouble']}"
        return
    yield f"  chosen: {named(name, kernel['chosen'])}, {time_text(kernel['time_us'])}"
    yield f"  {against_builtin(name, kernel)}"
    chosen = next((trial for trial in kernel["trials"] if trial["config"] == kernel["chosen"]), None)
    if chosen and chosen["parts"]:
        terms = {term: us for term, us in chosen["parts"].items() if term.endswith("_us") and term != "exposed_us"}
        slowest = sorted(terms, key=lambda term: -terms[term])[:3]
        bounds = ", ".join(f"{term.removesuffix('_us')} {time_text(terms[term])}" for term in slowest)
        yield f"  by the model it is bounded by {bounds}; waves cost a factor {chosen['parts']['quantisation']:.2f}"
    if (plan := plan_quality(kernel)) is not None:
        order = (
            f"the model orders the {plan.configs} configs that were timed with rank correlation {plan.correlation:.2f}"
        )
        yield f"  {order}; its own pick takes {plan.regret:.2f} times as long as the best"
    key = "time_us" if kernel["rounds"] else "predicted_us"
    standing = [trial for trial in kernel["trials"] if trial["refusal"] is None and trial[key] is not None]
    for trial in sorted(standing, key=lambda trial: trial[key])[:SHOWN]:
        used = (
            f"{trial['registers']} registers, {trial['shared_bytes'] / 1024:.0f} KiB, {trial['spill_bytes']} B spilled"
        )
        yield f"  {time_text(trial[key]):>10}  {named(name, trial['config'])}; {used}"
    for entry in kernel["quarantined"]:
        yield f"  out: {named(name, entry['config'])}: {entry['outcome']}: {entry['message']}"


def against_builtin(name: str, kernel: Kernel) -> str:
    """How the choice compares with the built-in config, in words."""
    if kernel["chosen"] == kernel["default"]:
        return f"it is the built-in config: none is faster by more than {MARGIN:.0%} and the noise"
    builtin = f"the built-in config ({named(name, kernel['default'])}) takes {time_text(kernel['default_time_us'])}"
    speedup = (kernel["measurement"] or {}).get("speedup")
    if speedup is None:
        return builtin
    ratio, least, most = speedup
    band = f"of those within {BAND:.0%} of the best, it was the last choice or takes fewest registers and shared memory"
    return f"{builtin}: {ratio:.3f} times as long (95 %: {least:.3f} to {most:.3f}); {band}"


def named(name: str, fields: Mapping[str, int]) -> str:
    """A kernel's config, as tables show it."""
    return config_text(as_config(name, fields))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Lines that say what `new` chose otherwise than `old`, and how times moved; nothing if nothing differs."""
    for what in ("device", "evidence"):
        if old[what] != new[what]:
            yield f"{what}: {old[what]} -> {new[what]}"
    if minor_version(old["version"]) != minor_version(new["version"]):
        yield f"version: {old['version']} -> {new['version']}"
    one, other = _kernels(old), _kernels(new)
    for key in sorted({*one, *other}):
        if key not in one or key not in other:
            yield f"{key}: only in the {'new' if key in other else 'old'} run"
        else:
            yield from _moved(key, one[key], other[key])


def _kernels(record: Mapping[str, Any]) -> dict[str, Kernel]:
    """Each kernel of each problem, by a name that says both."""
    return {
        f"{name}, {', '.join(f'{field} {value}' for field, value in run['problem'].items())}": kernel
        for run in record["runs"]
        for name, kernel in run["kernels"].items()
    }


def _moved(key: str, old: Kernel, new: Kernel) -> Iterator[str]:
    if old["chosen"] != new["chosen"]:
        yield f"{key}: {_plain(old['chosen'])} -> {_plain(new['chosen'])}"
    if old["time_us"] and new["time_us"] and abs(new["time_us"] / old["time_us"] - 1) > MARGIN:
        ratio = new["time_us"] / old["time_us"]
        yield f"{key}: {time_text(old['time_us'])} -> {time_text(new['time_us'])} ({ratio:.2f} times)"
    lost = {_plain(entry["config"]): entry["outcome"] for entry in new["quarantined"]}
    known = {_plain(entry["config"]) for entry in old["quarantined"]}
    for config in sorted(lost.keys() - known):
        yield f"{key}: {config} is newly in quarantine: {lost[config]}"


def _plain(fields: Mapping[str, int] | None) -> str:
    return "none" if fields is None else ",".join(f"{name}={value}" for name, value in fields.items())


def replay(name: str, kernel: Kernel, strategy: str, seed: int = 0) -> tuple[list[Config], int]:
    """What a strategy would have chosen on the recorded times, best first, and how many configs it looks at.

    Every config has the median of its recorded times in every round; what was not timed has failed.

    Raises:
        RecordError: for a kernel that was not timed.
    """
    if not kernel["rounds"]:
        raise RecordError(f"{name} was not timed: there is nothing to replay")
    times = {config_fields(as_config(name, t["config"])): t["time_us"] for t in kernel["trials"] if not t["refusal"]}
    configs = [as_config(name, trial["config"]) for trial in kernel["trials"]]
    default = as_config(name, kernel["default"])
    space = Space((default, *(config for config in configs if config != default)), most=0, seed=seed)
    search, rounds = STRATEGIES[strategy](space), list[Round]()
    try:
        asked = next(search)
        while True:
            rounds.append({config: times.get(config_fields(config)) for config in (*asked, default)})
            asked = search.send(rounds[-1])
    except StopIteration:
        pass
    return ranking(rounds, default, config_fields), len({config for found in rounds for config in found})
