"""Places go round among the tasks that wait."""

import asyncio

from services.validator.slots import FairSlots


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


def visitor(slots, task, served, leave):
    async def visit():
        async with slots.hold(task):
            served.append(task)
            await leave.acquire()

    return asyncio.create_task(visit())


async def test_a_quiet_task_is_served_next_however_many_wait_of_a_busy_one():
    slots, served, leave = FairSlots(1), [], asyncio.Semaphore(0)
    visits = [visitor(slots, "busy", served, leave) for _ in range(50)]
    await settle()
    visits += [visitor(slots, "quiet", served, leave) for _ in range(2)]
    for _ in range(52):
        leave.release()
    await asyncio.gather(*visits)
    assert served[:5] == ["busy", "busy", "quiet", "busy", "quiet"]
    assert len(served) == 52


async def test_no_more_than_the_limit_at_once():
    slots, served, leave = FairSlots(3), [], asyncio.Semaphore(0)
    visits = [visitor(slots, str(number), served, leave) for number in range(5)]
    await settle()
    assert len(served) == 3
    for _ in range(5):
        leave.release()
    await asyncio.gather(*visits)
    assert len(served) == 5


async def test_who_gives_up_waiting_takes_no_place_along():
    slots, served, leave = FairSlots(1), [], asyncio.Semaphore(0)
    held = slots.hold("a")
    await held.__aenter__()
    gone, second, third = (visitor(slots, "a", served, leave) for _ in range(3))
    await settle()
    gone.cancel()
    await settle()
    # The place is handed to the second in the same turn in which it is cancelled.
    await held.__aexit__(None, None, None)
    second.cancel()
    leave.release()
    await asyncio.wait_for(third, 5)
    assert served == ["a"]
    async with asyncio.timeout(5), slots.hold("b"):
        pass
