"""A plugin of pytest: a test fails where its code breaks one of the rules for a pool's connections.

PYTEST.md describes it. It imports SQLAlchemy when the first test is watched, not before.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ormscope.pool_rules import PoolRules

_OFF = {"", "0", "false", "no", "off"}
_FIXTURE = "pool_rules"


@dataclass(frozen=True)
class Rules:
    """Which rules hold for a test: no second connection, none left out, none held across a foreign await.

    `held_across_await` is how many seconds one such await may last; None switches that rule off.
    """

    second_connection: bool = True
    left_checked_out: bool = True
    held_across_await: float | None = 0.1

    def __bool__(self) -> bool:
        return self.second_connection or self.left_checked_out or self.held_across_await is not None


_RULES = {field.name for field in fields(Rules)}
_watching = pytest.StashKey["PoolRules"]()
_told = pytest.StashKey[set[object]]()
_failure = pytest.StashKey[BaseException]()  # what failed a test for the rules' sake
_has_failed = pytest.StashKey[bool]()  # by itself, or for the rules' sake, or was skipped
_KEYS: tuple[pytest.StashKey[Any], ...] = (_watching, _told, _failure, _has_failed)


# The settings.


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--ormscope` for all tests, or `ormscope = true` in the configuration, and a setting for each rule."""
    group = parser.getgroup("ormscope", "connections of SQLAlchemy's pools")
    group.addoption(
        "--ormscope",
        action="store_true",
        default=None,
        help="fail each test that asks for a second connection while it holds one, does not give one back, or holds "
        "one across a foreign await",
    )
    group.addoption(
        "--no-ormscope",
        dest="ormscope",
        action="store_false",
        help="do not watch any test, whatever the configuration, its marks or its fixtures say",
    )
    parser.addini("ormscope", "watch all tests, as --ormscope does", type="bool", default=False)
    parser.addini(
        "ormscope_second_connection",
        "whether a second connection fails a test that is watched (default: true)",
        type="bool",
        default=True,
    )
    parser.addini(
        "ormscope_left_checked_out",
        "whether a connection that is not given back fails a test that is watched (default: true)",
        type="bool",
        default=True,
    )
    parser.addini(
        "ormscope_held_across_await",
        "how many seconds a connection may be held across one foreign await, or false (default: 0.1)",
        default="0.1",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make the mark known. Raises UsageError where the configuration has no number of seconds."""
    config.addinivalue_line(
        "markers",
        "ormscope(second_connection=True, left_checked_out=True, held_across_await=0.1): watch this test's "
        "connections; False switches a rule off",
    )
    _configured(config)


def _configured(config: pytest.Config) -> Rules:
    text = str(config.getini("ormscope_held_across_await")).strip().lower()
    try:
        seconds = None if text in _OFF else _seconds(float(text))
    except ValueError:
        raise pytest.UsageError(
            f"ormscope_held_across_await = {text}: this is neither a number of seconds above 0 nor false"
        ) from None
    return Rules(
        second_connection=config.getini("ormscope_second_connection"),
        left_checked_out=config.getini("ormscope_left_checked_out"),
        held_across_await=seconds,
    )


def _seconds(value: Any) -> float | None:
    """A number of seconds; None for False. Raises ValueError for anything else, and for what is not above 0."""
    if value is False or value is None:
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not 0 < value < float("inf")
    ):
        raise ValueError
    return float(value)


def rules_of(item: pytest.Item, is_asked_for: bool = False) -> Rules | None:
    """The rules that hold for a test; None where it is not watched. Fails the test where its mark has an error."""
    wanted = item.config.getoption("ormscope")
    if wanted is False:
        return None
    marks = list(item.iter_markers("ormscope"))
    is_asked_for |= _FIXTURE in getattr(item, "fixturenames", ())
    if not (wanted or item.config.getini("ormscope") or marks or is_asked_for):
        return None
    rules = _configured(item.config)
    for mark in reversed(marks):  # the test's own is the first
        rules = _marked(rules, mark)
    return rules or None


def _marked(rules: Rules, mark: pytest.Mark) -> Rules:
    unknown = sorted(set(mark.kwargs) - _RULES)
    if mark.args or unknown:
        what = ", ".join([*map(repr, mark.args), *unknown])
        pytest.fail(
            f"@pytest.mark.ormscope takes {', '.join(sorted(_RULES))} by name, not {what}",
            pytrace=False,
        )
    changes: dict[str, Any] = dict(mark.kwargs)
    try:
        for name, value in changes.items():
            if name == "held_across_await":
                changes[name] = rules.held_across_await if value is True else _seconds(value)
            elif not isinstance(value, bool):
                raise ValueError
    except ValueError:
        pytest.fail(
            f"@pytest.mark.ormscope({name}={value!r}): this takes "
            + (
                "a number of seconds above 0, or False" if name == "held_across_await" else "a bool"
            ),
            pytrace=False,
        )
    return replace(rules, **changes)


# A test.


@pytest.fixture
def pool_rules(request: pytest.FixtureRequest) -> Iterator[PoolRules | None]:
    """Watches the test that asks for it; `violations` is what was seen so far, `check()` fails at once for that.

    None with `--no-ormscope`, or where all rules are switched off.
    """
    item = request.node
    if _watching not in item.stash:  # asked for by getfixturevalue, while the test runs
        _prepare(item, rules_of(item, is_asked_for=True))
        if _watching in item.stash:
            item.stash[_watching].start()
    yield item.stash.get(_watching, None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Make what watches; it begins with the test itself."""
    for key in _KEYS:  # of a run before, where tests are run again
        if key in item.stash:
            del item.stash[key]
    _prepare(item, rules_of(item))


def _prepare(item: pytest.Item, rules: Rules | None) -> None:
    if rules is not None:
        from ormscope.pool_rules import PoolRules

        item.stash[_watching] = PoolRules(rules)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Watch the test itself, and fail it for what was seen, unless it has failed by itself."""
    if _watching in item.stash:
        item.stash[_watching].start()
    try:
        result = yield
    finally:
        watch = item.stash.get(_watching, None)
        if watch is not None:
            watch.end_call(
                decide=not set(getattr(item, "fixturenames", ())) - {_FIXTURE, "request"}
            )
    if watch is not None:
        _fail(item, watch)
    return result


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """When the fixtures are down, see what nobody has given back."""
    try:
        result = yield
    finally:
        watch = item.stash.get(_watching, None)
        if watch is not None:
            watch.stop()
            if watch.failure is not None:
                item.warn(
                    pytest.PytestWarning(
                        f"ormscope could not watch this test: {type(watch.failure).__name__}: {watch.failure}"
                    )
                )
    if watch is not None and not item.stash.get(_has_failed, False):
        _fail(item, watch)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add what was seen to the report where it is not what failed the test."""
    report = yield
    watch = item.stash.get(_watching, None)
    if watch is None or call.when == "setup":
        return report
    excinfo = call.excinfo
    if excinfo is not None:
        item.stash[_has_failed] = True
    failure = item.stash.get(_failure, None)
    if failure is not None:
        del item.stash[_failure]
    if excinfo is None or excinfo.value is not failure:
        # unittest's own failures come to light only now, and take the place of ours.
        text = _new(item, watch) if failure is None else str(failure)
        add = getattr(report.longrepr, "addsection", None)
        if text and add is not None:
            add("ormscope", text)
        elif text:
            report.sections.append((f"ormscope {call.when}", text))
    return report


def _fail(item: pytest.Item, watch: PoolRules) -> None:
    """Fail a test for what has not been told yet."""
    text = _new(item, watch)
    if text:
        item.stash[_failure] = failure = pytest.fail.Exception(text, pytrace=False)
        raise failure


def _new(item: pytest.Item, watch: PoolRules) -> str:
    """The reports of what has not been told yet."""
    told = item.stash.setdefault(_told, set())
    found = [violation for violation in watch.violations if replace(violation, count=1) not in told]
    told.update(replace(violation, count=1) for violation in found)
    return "\n".join(f"ormscope: {violation}" for violation in found)
