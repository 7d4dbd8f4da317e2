"""Who is let into the engine, in what order, and who may go on from a slot's kept prompt."""

import asyncio
import random
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.turns import Busy, Gone, Turns


def run(coroutine):
    return asyncio.run(coroutine)


async def ask(turns, group, owner=None, messages=(), log=None, release=None, answered=True):
    async with turns.turn(group, owner or group, messages) as place:
        if log is not None:
            log.append((group, place.index, place.reuse))
        if release is not None:
            await release.wait()
        else:
            await asyncio.sleep(0)
        place.answered = answered


def test_a_kept_prompt_is_used_again_by_its_owner_alone():
    async def story():
        turns, log = Turns(2, 9), []
        for group, owner in (("a", "a1"), ("a", "a1"), ("a", "a2"), ("a", "a1"), ("b", "a1b")):
            await ask(turns, group, owner, log=log)
        return log

    log = run(story())
    assert [reuse for _, _, reuse in log] == [False, True, False, True, False]
    assert log[1][1] == log[0][1] != log[2][1]


def test_a_request_that_was_cut_off_leaves_a_slot_that_is_nobodys():
    async def story():
        turns, log = Turns(1, 9), []
        await ask(turns, "a", log=log)
        await ask(turns, "b", log=log, answered=False)
        await ask(turns, "b", log=log)
        await ask(turns, "b", log=log, answered=False)
        await ask(turns, "b", log=log)
        return [reuse for _, _, reuse in log]

    assert run(story()) == [False, False, False, True, False]


def test_a_conversation_comes_back_to_the_slot_that_has_most_of_it():
    async def story():
        turns, log = Turns(3, 9), []
        hold = asyncio.Event()
        both = [asyncio.create_task(ask(turns, "a", messages=m, log=log, release=hold)) for m in ((1, 2), (1, 3))]
        await asyncio.sleep(0)
        hold.set()
        await asyncio.gather(*both)
        await ask(turns, "a", messages=(1, 3, 4, 5), log=log)
        await ask(turns, "a", messages=(1, 2, 6, 7), log=log)
        return [index for _, index, _ in log]

    first, second, third, fourth = run(story())
    assert (third, fourth) == (second, first) and first != second


def test_another_prompt_of_the_same_owner_takes_an_unused_slot_and_none_is_lost():
    async def story():
        turns, log = Turns(3, 9), []
        for messages in ((1, 5), (2, 5), (1, 6), (2, 6), (3, 5), (4, 5)):
            await ask(turns, "a", messages=messages, log=log)
        return [index for _, index, _ in log]

    first, second, third, fourth, fifth, sixth = run(story())
    assert (third, fourth) == (first, second) and len({first, second, fifth}) == 3 and sixth == first


def test_requests_of_one_group_go_together_and_the_next_group_waits_its_turn():
    async def story():
        turns, log, hold = Turns(2, 99), [], asyncio.Event()
        tasks = [asyncio.create_task(ask(turns, "x", release=hold)) for _ in range(2)]
        tasks += [asyncio.create_task(ask(turns, g, log=log)) for g in "ababcabc"]
        await asyncio.sleep(0.01)
        hold.set()
        await asyncio.gather(*tasks)
        return "".join(group for group, _, _ in log)

    assert run(story()) == "aaabbbcc"


def test_a_busy_group_gives_way_after_its_quota():
    async def story():
        turns, log = Turns(2, 999), []
        tasks = [asyncio.create_task(ask(turns, "a", log=log)) for _ in range(50)]
        tasks += [asyncio.create_task(ask(turns, "b", log=log))]
        await asyncio.gather(*tasks)
        return [group for group, _, _ in log].index("b")

    assert run(story()) <= 2 * 2


def test_no_more_than_two_groups_are_ever_in_the_engine():
    async def story():
        turns, most = Turns(4, 999), []

        async def one(group):
            async with turns.turn(group, group):
                most.append(len(turns.running))
                await asyncio.sleep(random.random() / 1000)

        await asyncio.gather(*(one(random.choice("abcdef")) for _ in range(300)))
        assert not turns.running and not turns.waiting
        return max(most)

    assert run(story()) == 2


def test_one_too_many_is_sent_away_at_once():
    async def story():
        turns, hold = Turns(1, 2), asyncio.Event()
        tasks = [asyncio.create_task(ask(turns, "a", release=hold)) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Busy):
            await ask(turns, "a")
        hold.set()
        await asyncio.gather(*tasks)
        await ask(turns, "a")

    run(story())


def test_who_waits_when_the_engine_goes_is_sent_away_and_so_is_who_comes():
    async def story():
        turns, hold = Turns(1, 9), asyncio.Event()
        tasks = [asyncio.create_task(ask(turns, "a", release=hold)) for _ in range(3)]
        await asyncio.sleep(0)
        turns.close()
        hold.set()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(end) for end in ended] == [type(None), Gone, Gone]
        with pytest.raises(Gone):
            await ask(turns, "a")

    run(story())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans(), st.integers(0, 3)), max_size=40), st.integers(1, 4))
def test_whoever_leaves_whenever_all_others_are_served_and_no_cache_changes_hands(requests, slots):
    """A model of the engine: each slot remembers whose prompt it last really saw."""

    async def story():
        turns, holds = Turns(slots, 999), [None] * slots

        async def one(group, answered, pauses):
            async with turns.turn(group, group) as place:
                assert not place.reuse or holds[place.index] == group
                if not answered:
                    return  # it may or may not have reached the engine: here, it has not
                holds[place.index] = group
                for _ in range(pauses):
                    await asyncio.sleep(0)
                place.answered = True

        tasks = [asyncio.create_task(one(*request)) for request in requests]
        await asyncio.sleep(0)
        for task in tasks[::5]:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await asyncio.wait_for(task, 5)
        assert not turns.running and not turns.waiting
        assert all(not slot.busy for slot in turns._places)

    run(story())
