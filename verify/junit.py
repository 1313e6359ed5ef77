"""JUnit XML from a record, for the test reports of CI systems."""

from __future__ import annotations

from xml.etree import ElementTree

from .record import Record, Result


def as_junit(record: Record) -> str:
    """One test suite for each layer, one test case for each result; what did not run is skipped, with its reason."""
    root = ElementTree.Element("testsuites", name="cca-verify", time=f"{record.footer.duration_s:.3f}")
    for layer in dict.fromkeys(result.layer for result in record.results):
        results = [result for result in record.results if result.layer == layer]
        numbers = {
            "tests": len(results),
            "failures": sum(result.status == "fail" for result in results),
            "errors": sum(result.status == "error" for result in results),
            "skipped": sum(result.status in ("skip", "not-run") for result in results),
        }
        texts = {name: str(number) for name, number in numbers.items()}
        seconds = sum(result.duration_s for result in results)
        suite = ElementTree.SubElement(root, "testsuite", {"name": layer, "time": f"{seconds:.3f}", **texts})
        for result in results:
            _add(suite, result)
    if not record.complete:
        suite = ElementTree.SubElement(root, "testsuite", name="run", tests="1", errors="1", failures="0", skipped="0")
        case = ElementTree.SubElement(suite, "testcase", classname="cca-verify", name="complete")
        ElementTree.SubElement(case, "error", message="the run was interrupted")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _add(suite: ElementTree.Element, result: Result) -> None:
    name = result.id.removeprefix(f"{result.layer}/")
    case = ElementTree.SubElement(
        suite, "testcase", classname=f"cca-verify.{result.layer}", name=name, time=f"{result.duration_s:.3f}"
    )
    kinds = {"fail": "failure", "error": "error", "skip": "skipped", "not-run": "skipped"}
    if result.status in kinds:
        said = _printable(result.message)
        ElementTree.SubElement(case, kinds[result.status], message=said).text = _printable(result.case)
    elif result.warnings:
        ElementTree.SubElement(case, "system-out").text = _printable("\n".join(result.warnings))


def _printable(text: str) -> str:
    """Without the control characters that XML forbids."""
    return "".join(c for c in text if c in "\n\t" or ord(c) >= 32)
