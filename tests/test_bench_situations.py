"""What `bench.situations` measures and prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import quota, situations
from fastbn import threads


@pytest.mark.parametrize("name", situations.SITUATIONS)
def test_each_situation_measures_each_size_and_operation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(situations, "TURN", 1)  # a turn of ten calls that each wait for 50 ms takes long
    if reason := situations.why_not(name):
        assert name in situations.UNAVAILABLE
        assert len(reason) > 20
        return
    rows = list(situations.measure(name, [200, 400], ["forward", "backward"], [1, 2], 1e-3))
    assert [(row.nbytes, row.op) for row in rows] == [(kb * 1000, op) for kb in (200, 400) for op in ("forward", "backward")]
    assert all(0 < row.median[n] <= row.p99[n] for row in rows for n in (1, 2))


def test_threads_take_turns_and_the_first_call_of_a_turn_does_not_count() -> None:
    order: list[str] = []
    taken = situations.times(lambda: order.append("call"), lambda: order.append("before"), [1, 2], 1e-9)
    assert order == ["before", "call"] * (len(order) // 2)
    assert len(taken[1]) == len(taken[2]) == 2 * situations.TURN
    assert len(order) == 2 * (len(taken[1]) + len(taken[2])) * (situations.TURN + 1) // situations.TURN


def test_the_table_has_a_column_for_each_number_of_threads(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--situations", "loop", "--ops", "inference", "--sizes", "100", "--threads", "3", "--seconds", "0.001"]
    assert situations.main(few) == 0
    printed = capsys.readouterr().out
    assert all(title in printed for title in ("1 thread", "2 threads", "3 threads", "inference"))


def test_what_this_machine_lacks_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(situations.UNAVAILABLE, "half-a-processor", lambda: "the moon is full")
    assert situations.main(["--situations", "half-a-processor"]) == 0
    assert "half-a-processor: the moon is full" in capsys.readouterr().err


def test_a_quota_ends_with_its_situation() -> None:
    if quota.unavailable():
        with pytest.raises(RuntimeError, match="control group"), quota.quota(0.5):
            pass
        return
    before = threads.quota()
    with quota.quota(0.5):
        assert threads.quota() == 0.5
    assert threads.quota() == before


ROWS = [situations.Row("forward", size, name, {1: 2.0, 2: 1.0}, {1: 3.0, 2: 2.0}) for size in (10, 20) for name in ("loop", "busy")]


def test_rows_are_read_back_as_they_were_written() -> None:
    about, rows = situations.read_json(situations.as_json({"cores": 2}, ROWS))
    assert about == {"cores": 2}
    assert rows == ROWS


def test_the_table_of_gains_has_a_line_for_each_situation_and_a_column_for_each_size() -> None:
    assert situations.gains(ROWS[1:]).splitlines()[-2:] == ["| busy | forward | 2.00 | 2.00 |", "| loop | forward | - | 2.00 |"]


def test_the_gains_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    situations.draw(ROWS, [1, 2], tmp_path / "gains.png")
    assert (tmp_path / "gains.png").stat().st_size > 1000


@pytest.mark.parametrize("wrong", [["--threads", "0"], ["--seconds", "-1"], ["--sizes", "0"], ["--situations", "sea"], ["--ops", "sum"]])
def test_wrong_arguments_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        situations.main(wrong)
    assert ended.value.code == 2
    assert wrong[0] in capsys.readouterr().err
