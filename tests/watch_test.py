"""Notices to leave are taken at once or at a step, and a step that hangs is told."""

import os
import pathlib
import signal
import threading

import pytest

from neo_jax import watch
from neo_jax.watch import HangWatch, Preempted, Preemption


def send_notice() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


# ------------------------------------------------------------------------------- notices


def test_a_notice_ends_at_once_what_holds_no_work() -> None:
    with Preemption(), pytest.raises(Preempted, match="nothing was under way"):
        send_notice()


def test_while_work_is_under_way_it_waits_for_the_next_question(capsys) -> None:
    answers = []

    def work(preemption: Preemption) -> None:
        with preemption.deferred():
            answers.append(preemption.reached())
            preemption.leave_if_told()
            send_notice()
            answers.append(preemption.reached())
            raise Preempted(7)

    with Preemption() as preemption:
        with pytest.raises(Preempted, match="all up to step 7 is saved"):
            work(preemption)
        assert capsys.readouterr().err == "neo_jax: told to stop; saving first.\n"
        send_notice()  # and it is taken once
    assert answers == [False, True]


def test_what_may_be_broken_off_is() -> None:
    def evaluate(preemption: Preemption) -> None:
        with preemption.deferred():
            send_notice()
            preemption.leave_if_told()
            raise AssertionError("it went on")

    with Preemption() as preemption, pytest.raises(Preempted):
        evaluate(preemption)


def test_a_notice_after_the_last_question_is_not_forgotten() -> None:
    done = []

    def work(preemption: Preemption) -> None:
        with preemption.deferred():
            send_notice()
            done.append(True)

    with Preemption() as preemption, pytest.raises(Preempted):
        work(preemption)
    assert done


def test_afterwards_the_signal_means_what_it_meant() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Preemption():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_thread_beside_takes_no_signals() -> None:
    """Python allows them in the main thread only; a notebook's runs may be elsewhere."""
    failures = []

    def use() -> None:
        try:
            with Preemption() as preemption:
                assert not preemption.reached()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert not failures


def test_the_exit_code_is_that_of_sysexits() -> None:
    assert watch.EXIT_PREEMPTED == os.EX_TEMPFAIL


# ---------------------------------------------------------------------------------- hangs


class Hung:
    """A watch that is asked by hand, over steps of 0.5 seconds."""

    def __init__(self, path: pathlib.Path) -> None:
        self.now, self.told, self.path = 0.0, list[str](), path
        self.watch = HangWatch(path, self.told.append, clock=lambda: self.now)
        for step in range(1, 8):
            self.step(step)

    def step(self, number: int, seconds: float = 0.5) -> None:
        self.watch.step(number)
        self.now += seconds

    def look_after(self, seconds: float) -> list[str]:
        self.now += seconds
        self.watch.look()
        return self.told


@pytest.fixture
def hung(tmp_path: pathlib.Path) -> Hung:
    return Hung(tmp_path / "hangs.txt")


def test_a_step_of_ten_medians_has_every_threads_stack_logged(hung: Hung) -> None:
    stop, name = threading.Event(), "one that waits"
    thread = threading.Thread(target=stop.wait, name=name)
    thread.start()
    hung.watch.step(8)
    assert hung.look_after(4.9) == []
    (line,) = hung.look_after(0.2)
    stop.set()
    thread.join()
    assert line.startswith("step 8 takes 5.1 s so far, the median is 0.500 s")
    text = hung.path.read_text()
    assert f"thread {name!r}" in text and "thread 'MainThread'" in text
    assert "test_a_step_of_ten_medians" in text  # where this one is
    # Once a step, however long it goes on; the next one may hang again.
    assert len(hung.look_after(100)) == 1
    hung.watch.step(9)
    assert len(hung.look_after(5.1)) == 2


def test_what_is_allowed_to_take_long_is_no_hang(hung: Hung) -> None:
    hung.watch.step(8)
    with hung.watch.pause():
        assert hung.look_after(1000) == []
    assert hung.look_after(1000) == []
    # Nor does it count among the steps that the median is of.
    hung.watch.step(9)
    assert len(hung.look_after(5.1)) == 1


def test_without_a_median_and_below_a_second_nothing_is_told(tmp_path) -> None:
    hung = Hung(tmp_path / "hangs.txt")
    hung.watch = HangWatch(hung.path, hung.told.append, clock=lambda: hung.now)
    for step in range(1, 6):
        hung.step(step, 0.001)
        assert hung.look_after(30 if step < 5 else 0) == []
    quick = HangWatch(hung.path, hung.told.append, clock=lambda: hung.now)
    for step in range(1, 9):
        quick.step(step)
        hung.now += 0.001
    hung.now += 0.5
    quick.look()
    assert hung.told == [] and not hung.path.exists()


def test_the_watch_looks_by_itself_and_ends(tmp_path) -> None:
    looked = threading.Event()

    class Looking(HangWatch):
        def look(self) -> None:
            looked.set()

    with Looking(tmp_path / "hangs.txt", print) as hang_watch:
        assert looked.wait(60)
    assert not hang_watch._thread.is_alive()
