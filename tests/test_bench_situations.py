"""What `bench.situations` measures and prints."""

from __future__ import annotations

import pytest

from bench import situations


@pytest.mark.parametrize("name", situations.SITUATIONS)
def test_each_situation_measures_each_size_and_operation(name: str) -> None:
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


@pytest.mark.parametrize("wrong", [["--threads", "0"], ["--seconds", "-1"], ["--sizes", "0"], ["--situations", "sea"], ["--ops", "sum"]])
def test_wrong_arguments_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        situations.main(wrong)
    assert ended.value.code == 2
    assert wrong[0] in capsys.readouterr().err
