"""junit.xml, which most CI systems show: a suite a backend, a test a case.

Format: https://github.com/testmoapp/junitxml. A known deviation is skipped there, which has no word
for it.
"""

from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from moge_hal.conformance.result import Outcome, Result


def render(result: Result) -> bytes:
    """The file's contents."""
    root = Element("testsuites", name="moge_hal conformance")
    for backend in result.backends:
        outcomes = [outcome for outcome in result.outcomes if outcome.backend == backend]
        words = [outcome.outcome for outcome in outcomes]
        suite = SubElement(
            root,
            "testsuite",
            name=backend,
            tests=str(len(outcomes)),
            failures=str(words.count("failed")),
            errors="0",
            skipped=str(words.count("skipped") + words.count("deviates")),
            time=f"{sum(outcome.seconds for outcome in outcomes):.3f}",
        )
        for outcome in outcomes:
            _test(suite, outcome)
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, "utf-8", xml_declaration=True))


def _test(suite: Element, outcome: Outcome) -> None:
    op, dtype, *_ = outcome.id.split("/")
    test = SubElement(
        suite,
        "testcase",
        classname=f"{outcome.backend}.{op}.{dtype}",
        name=outcome.id,
        time=f"{outcome.seconds:.4f}",
    )
    if outcome.outcome == "failed":
        failure = SubElement(test, "failure", message=outcome.reason)
        failure.text = f"error {outcome.error}, limit {outcome.limit}\n{outcome.replay}"
    elif outcome.outcome != "passed":
        SubElement(test, "skipped", message=f"{outcome.outcome}: {outcome.reason}")
