"""The ledger: who computes what, what is accepted, who is given up. No clock, no loop, no arithmetic."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from asynctrain.executors.ledger import (
    FATAL,
    Decision,
    Fail,
    GiveUp,
    Ledger,
    Patience,
    Send,
    Start,
    Statistics,
    Stop,
)

WAIT = 30.0
PATIENCE = Patience(floor=2.0, factor=4.0)


def ledger_with(*addresses: str, slots: int = 1) -> Ledger:
    """Return a ledger whose workers have received the first parameters."""
    ledger = Ledger(WAIT, PATIENCE)
    ledger.publish()
    for address in addresses:
        ledger.join(address, slots)
    ledger.decide(0.0)
    for address in addresses:
        ledger.received(address)
    return ledger


def starts(decisions: list[Decision]) -> list[Start]:
    return [decision for decision in decisions if isinstance(decision, Start)]


def test_the_oldest_task_goes_to_the_least_busy_worker() -> None:
    ledger = ledger_with("a", "b", slots=2)
    tasks = [ledger.submit() for _ in range(5)]
    begun = starts(ledger.decide(0.0))
    assert [(start.task, start.address) for start in begun] == list(zip(tasks[:4], "abab", strict=True))
    assert ledger.returned(begun[1].attempt, 1.0)
    assert [(start.task, start.address) for start in starts(ledger.decide(1.0))] == [(tasks[4], "b")]


def test_a_worker_gets_no_work_before_it_has_received_the_parameters() -> None:
    ledger = Ledger(WAIT, PATIENCE)
    ledger.publish()
    ledger.join("a", 1)
    ledger.submit()
    assert ledger.decide(0.0) == [Send("a")]
    assert ledger.decide(1.0) == []
    ledger.received("a")
    assert len(starts(ledger.decide(1.0))) == 1


def test_the_parameters_are_sent_once_to_each_worker_and_edition() -> None:
    ledger = ledger_with("a", "b")
    ledger.publish()
    assert ledger.decide(0.0) == [Send("a"), Send("b")]
    assert ledger.decide(0.0) == []
    ledger.join("c", 1)
    assert ledger.decide(0.0) == [Send("c")]


def test_what_a_lost_worker_had_goes_to_another_and_its_late_result_is_dropped_and_counted() -> None:
    ledger = ledger_with("a", "b")
    task = ledger.submit()
    (first,) = starts(ledger.decide(0.0))
    ledger.lose(first.address)
    decisions = ledger.decide(0.0)
    assert decisions[0] == Stop(first.attempt)
    (second,) = starts(decisions)
    assert (second.task, second.address, second.instead_of) == (task, "b", None)
    assert not ledger.returned(first.attempt, 0.5)
    assert ledger.returned(second.attempt, 1.0)
    assert ledger.statistics == Statistics(accepted=1, late=1, lost=1)


def test_a_lost_worker_s_late_result_is_dropped_even_if_another_has_taken_its_address() -> None:
    ledger = ledger_with("a")
    ledger.submit()
    (first,) = starts(ledger.decide(0.0))
    ledger.lose("a")
    ledger.join("a", 1)
    ledger.decide(0.0)
    ledger.received("a")
    (second,) = starts(ledger.decide(0.0))
    assert not ledger.returned(first.attempt, 0.5)
    assert not ledger.is_idle("a")
    assert ledger.returned(second.attempt, 0.5)


def test_what_is_not_back_in_time_is_computed_by_another_too_and_the_first_result_wins() -> None:
    ledger = ledger_with("a", "b")
    ledger.submit()
    (first,) = starts(ledger.decide(0.0))
    assert ledger.deadline() == 2.0
    assert ledger.decide(1.9) == []
    (copy,) = starts(ledger.decide(2.0))
    assert (copy.task, copy.address, copy.instead_of) == (first.task, "b", "a")
    assert ledger.returned(copy.attempt, 2.1)
    assert ledger.decide(2.1) == [Stop(first.attempt)]
    assert not ledger.returned(first.attempt, 2.2), "both were back; one counts"
    assert ledger.statistics == Statistics(accepted=1, duplicates=1, speculated=1)


def test_the_deadline_is_a_multiple_of_the_median_duration_where_that_is_above_the_floor() -> None:
    ledger = ledger_with("a")
    for seconds in (1.0, 9.0, 1.5):
        ledger.submit()
        (start,) = starts(ledger.decide(0.0))
        ledger.returned(start.attempt, seconds)
    assert ledger.patience == 6.0


def test_nobody_computes_the_same_twice_and_a_third_helps_when_the_second_is_late_too() -> None:
    ledger = ledger_with("a")
    ledger.submit()
    ledger.decide(0.0)
    assert ledger.decide(5.0) == []
    assert ledger.deadline() is None, "nothing to wait for but a worker"
    for address in "bc":
        ledger.join(address, 1)
    ledger.decide(5.0)
    ledger.received("b")
    assert [start.address for start in starts(ledger.decide(5.0))] == ["b"]
    ledger.received("c")
    assert ledger.decide(5.0) == []
    assert [(start.address, start.instead_of) for start in starts(ledger.decide(7.0))] == [("c", "b")]


def test_a_worker_that_was_too_slow_sits_out_until_two_editions_later() -> None:
    ledger = ledger_with("a", "b")
    ledger.submit()
    (first,) = starts(ledger.decide(0.0))
    (copy,) = starts(ledger.decide(2.0))
    ledger.returned(copy.attempt, 2.1)
    ledger.ended(first.attempt)
    took_part = []
    for _ in range(3):
        ledger.submit()
        ledger.submit()
        begun = starts(ledger.decide(3.0))
        took_part.append({start.address for start in begun})
        while begun:
            for start in begun:
                ledger.returned(start.attempt, 3.1)
            begun = starts(ledger.decide(3.1))
        ledger.publish()
        ledger.decide(3.1)
        ledger.received("a")
        ledger.received("b")
    assert took_part == [{"b"}, {"b"}, {"a", "b"}]


def test_the_only_worker_gets_work_however_slow_it_is() -> None:
    ledger = ledger_with("a")
    ledger.submit()
    (first,) = starts(ledger.decide(0.0))
    ledger.decide(100.0)
    assert ledger.returned(first.attempt, 100.0)
    ledger.submit()
    assert len(starts(ledger.decide(100.0))) == 1


def test_a_withdrawn_task_is_stopped_and_its_result_dropped_as_late() -> None:
    ledger = ledger_with("a")
    running, waiting = ledger.submit(), ledger.submit()
    (start,) = starts(ledger.decide(0.0))
    ledger.withdraw(running)
    ledger.withdraw(waiting)
    ledger.withdraw(waiting)
    assert ledger.decide(0.0) == [Stop(start.attempt)]
    assert not ledger.returned(start.attempt, 1.0)
    assert ledger.statistics == Statistics(late=1)


def test_an_attempt_that_came_to_nothing_is_made_again() -> None:
    ledger = ledger_with("a")
    task = ledger.submit()
    (first,) = starts(ledger.decide(0.0))
    ledger.ended(first.attempt)
    ledger.ended(first.attempt)
    assert [start.task for start in starts(ledger.decide(0.0))] == [task]


def test_a_worker_more_than_one_version_behind_is_told_to_go() -> None:
    ledger = ledger_with("a", "b")
    ledger.publish()
    ledger.decide(0.0)
    ledger.received("a")
    assert ledger.receiving
    ledger.publish()
    assert ledger.decide(1.0)[0] == GiveUp("b", "it is more than one version of the parameters behind")
    assert ledger.slots == 1


def test_a_worker_that_does_not_receive_is_given_up_in_time() -> None:
    ledger = Ledger(WAIT, PATIENCE)
    ledger.publish()
    ledger.join("a", 1)
    ledger.decide(0.0)
    assert ledger.deadline() == WAIT
    assert ledger.decide(WAIT) == [GiveUp("a", "it did not receive the parameters within 30 s")]


def test_without_a_worker_tasks_wait_and_then_fail() -> None:
    ledger = ledger_with("a")
    task = ledger.submit()
    ledger.decide(0.0)
    ledger.lose("a")
    ledger.decide(10.0)
    assert ledger.deadline() == 10.0 + WAIT
    assert ledger.decide(39.9) == []
    assert ledger.decide(40.0) == [Fail(task, "alone")]
    assert ledger.deadline() is None


def test_a_worker_that_comes_in_time_saves_the_waiting_and_the_clock_begins_anew() -> None:
    ledger = ledger_with("a")
    ledger.submit()
    ledger.decide(0.0)
    ledger.lose("a")
    ledger.decide(0.0)
    ledger.join("b", 1)
    ledger.decide(29.0)
    ledger.received("b")
    assert len(starts(ledger.decide(29.0))) == 1
    ledger.lose("b")
    ledger.decide(29.5)
    assert ledger.deadline() == 59.5


def test_new_parameters_outdate_what_still_waits_for_the_old_ones() -> None:
    ledger = ledger_with("a")
    running, waiting = ledger.submit(), ledger.submit()
    (start,) = starts(ledger.decide(0.0))
    ledger.publish()
    assert Fail(waiting, "outdated") in ledger.decide(0.0)
    assert ledger.returned(start.attempt, 1.0), "what was begun with the old ones is right"
    assert running == start.task


def test_a_task_that_is_the_end_of_many_workers_is_given_up() -> None:
    ledger = ledger_with()
    task = ledger.submit()
    for number in range(FATAL):
        ledger.join(f"{number}", 1)
        ledger.decide(0.0)
        ledger.received(f"{number}")
        assert len(starts(ledger.decide(0.0))) == 1
        ledger.lose(f"{number}")
    assert Fail(task, "fatal") in ledger.decide(0.0)


def test_a_leaving_worker_keeps_what_it_has_and_gets_nothing_new() -> None:
    ledger = ledger_with("a", "b")
    ledger.submit()
    (start,) = starts(ledger.decide(0.0))
    ledger.leave("a")
    ledger.submit()
    ledger.submit()
    assert [begun.address for begun in starts(ledger.decide(0.0))] == ["b"]
    assert not ledger.is_idle("a")
    assert ledger.returned(start.attempt, 1.0)
    assert ledger.is_idle("a")
    assert starts(ledger.decide(1.0)) == []
    ledger.left("a")
    assert ledger.statistics.lost == 0


def test_a_home_without_slots_gets_no_work_and_what_it_had_is_computed_elsewhere_at_once() -> None:
    ledger = ledger_with("a", "b")
    ledger.submit()
    (first,) = starts(ledger.decide(0.0))
    ledger.resize("a", 0)
    (copy,) = starts(ledger.decide(0.0))
    assert (copy.task, copy.address) == (first.task, "b")
    ledger.resize("b", 0)
    ledger.submit()
    assert starts(ledger.decide(0.0)) == []
    assert ledger.deadline() == WAIT, "homes without a worker are as good as none"


@pytest.mark.parametrize(("floor", "factor"), [(0.0, 2.0), (1.0, 0.5)])
def test_a_patience_of_nothing_is_refused(floor: float, factor: float) -> None:
    with pytest.raises(ValueError, match="floor must be above 0 and factor at least 1, got"):
        Patience(floor, factor)


def test_two_workers_at_one_address_are_refused() -> None:
    with pytest.raises(ValueError, match="address must be a new one for a worker that joins, there is one at a"):
        ledger_with("a").join("a", 1)


class Schedules(RuleBasedStateMachine):
    """Whatever happens in whatever order, against a model that knows only what was asked and what was decided."""

    @initialize()
    def begin(self) -> None:
        self.now = 0.0
        self.ledger = Ledger(WAIT, PATIENCE)
        self.joined = 0
        self.editions = 0
        self.slots: dict[str, int] = {}
        self.holds: dict[str, int] = {}  # the edition that each worker has
        self.sent: dict[str, int] = {}  # the edition that each is being sent
        self.leaving: set[str] = set()
        self.wanted: dict[int, int] = {}  # tasks whose result is awaited, and their edition
        self.accepted: Counter[int] = Counter()
        self.failed: Counter[int] = Counter()
        self.attempts: dict[int, Start] = {}  # begun and not ended
        self.dropped = 0
        self.ledger.publish()
        self.editions = 1
        self.act()

    def act(self) -> None:
        for decision in self.ledger.decide(self.now):
            match decision:
                case Send(address):
                    assert address in self.slots
                    assert address not in self.sent, "the parameters travel once"
                    assert self.holds.get(address, 0) < self.editions
                    self.sent[address] = self.editions
                case Start():
                    self.check_start(decision)
                    self.attempts[decision.attempt] = decision
                case Stop(attempt):
                    start = self.attempts[attempt]
                    assert start.task not in self.wanted or start.address not in self.slots
                case GiveUp(address):
                    self.forget(address)
                case Fail(task, trouble):
                    edition = self.wanted.pop(task)
                    self.failed[task] += 1
                    if trouble == "alone":
                        assert not self.able()
                    elif trouble == "outdated":
                        assert edition < self.editions
        deadline = self.ledger.deadline()
        assert deadline is None or deadline > self.now, "what is due is decided: nothing spins"

    def check_start(self, start: Start) -> None:
        assert start.task in self.wanted, "only what is wanted is computed"
        assert self.holds[start.address] == self.editions == self.wanted[start.task], "with the right parameters"
        assert start.address not in self.leaving
        at_work = [other for other in self.attempts.values() if other.address == start.address]
        assert len(at_work) < self.slots[start.address]
        assert all(other.task != start.task for other in at_work), "nobody computes the same twice at a time"

    def able(self) -> list[str]:
        return [address for address, slots in self.slots.items() if slots and address not in self.leaving]

    def forget(self, address: str) -> None:
        del self.slots[address]
        self.holds.pop(address, None)
        self.sent.pop(address, None)
        self.leaving.discard(address)

    def draw(self, data: st.DataObject, choices: Any) -> Any:
        return data.draw(st.sampled_from(sorted(choices)))

    @rule(slots=st.integers(1, 3))
    def join(self, slots: int) -> None:
        self.joined += 1
        address = f"w{self.joined}"
        self.ledger.join(address, slots)
        self.slots[address] = slots
        self.act()

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        address = self.draw(data, self.slots)
        self.ledger.lose(address)
        self.forget(address)
        self.act()

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        address = self.draw(data, self.slots)
        self.ledger.leave(address)
        self.leaving.add(address)
        self.act()

    @precondition(lambda self: self.slots)
    @rule(data=st.data(), slots=st.integers(0, 3))
    def resize(self, data: st.DataObject, slots: int) -> None:
        address = self.draw(data, self.slots)
        self.ledger.resize(address, slots)
        self.slots[address] = slots
        self.act()

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def receive(self, data: st.DataObject) -> None:
        address = self.draw(data, self.sent)
        self.ledger.received(address)
        self.holds[address] = self.sent.pop(address)
        self.act()

    @rule()
    def publish(self) -> None:
        behind = set(self.sent)
        self.ledger.publish()
        self.editions += 1
        self.act()
        assert not behind & self.slots.keys(), "who had not received the last ones is told to go"

    @rule()
    def submit(self) -> None:
        self.wanted[self.ledger.submit()] = self.editions
        self.act()

    @precondition(lambda self: self.wanted)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        task = self.draw(data, self.wanted)
        self.ledger.withdraw(task)
        del self.wanted[task]
        self.act()

    @precondition(lambda self: self.attempts)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        """Let any attempt be back, stopped and late ones too."""
        start = self.attempts.pop(self.draw(data, self.attempts))
        counts = self.ledger.returned(start.attempt, self.now)
        if counts:
            assert start.address in self.slots
            del self.wanted[start.task]
            self.accepted[start.task] += 1
        else:
            self.dropped += 1
            assert start.task not in self.wanted or self.lost_since(start)
        self.act()

    def lost_since(self, start: Start) -> bool:
        return start.address not in self.slots  # addresses are never used again here

    @precondition(lambda self: self.attempts)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        start = self.attempts.pop(self.draw(data, self.attempts))
        self.ledger.ended(start.attempt)
        self.act()

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0, 40.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.act()

    @invariant()
    def no_task_has_two_results_and_each_result_is_counted(self) -> None:
        if not hasattr(self, "ledger"):
            return
        assert all(count == 1 for count in (self.accepted + self.failed).values())
        statistics = self.ledger.statistics
        assert statistics.accepted == self.accepted.total()
        assert statistics.late + statistics.duplicates == self.dropped

    @invariant()
    def no_task_is_forgotten(self) -> None:
        """A wanted task is under way, or waits because nobody who could begin it has a free place."""
        if not hasattr(self, "ledger"):
            return
        under_way = {start.task for start in self.attempts.values() if start.address in self.slots}
        for task in self.wanted.keys() - under_way:
            assert self.ledger.deadline() is not None or self.busy(), f"task {task} waits for nothing"

    def busy(self) -> bool:
        """Return whether some worker is still to end an attempt, after which it is free."""
        return any(start.address in self.slots for start in self.attempts.values())

    def teardown(self) -> None:
        """From wherever the schedule has led, a worker that does its work brings everything to an end."""
        if not hasattr(self, "ledger"):
            return
        self.join(3)
        helper = f"w{self.joined}"
        for _ in range(10 * (len(self.wanted) + len(self.attempts) + 1)):
            if helper in self.sent:
                self.ledger.received(helper)
                self.holds[helper] = self.sent.pop(helper)
                self.act()
            mine = [start for start in self.attempts.values() if start.address == helper]
            if mine:
                start = self.attempts.pop(mine[0].attempt)
                if self.ledger.returned(start.attempt, self.now):
                    del self.wanted[start.task]
                    self.accepted[start.task] += 1
                self.act()
            else:
                self.now += 100.0  # past every deadline
                self.act()
                if helper not in self.slots:
                    break
        lost = [task for task, edition in self.wanted.items() if edition == self.editions]
        assert not lost, "no task is lost while somebody lives"


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
