"""Values that threads compute ahead of their use: in order, a bounded number of them."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")


def prefetched(
    function: Callable[[Item], Value],
    items: Iterable[Item],
    *,
    ahead: int,
    workers: int = 1,
    name: str = "prefetch",
) -> Generator[Value]:
    """`function(item)` of all items, in their order; while one value is used, `workers` threads
    compute up to `ahead` later ones.

    With `workers=0` the caller's thread computes each value when it is asked for. What `function`
    raises is raised where its value would have come. The threads end with the generator: whoever
    may leave early closes it (contextlib.closing).
    """
    if workers == 0:
        yield from map(function, items)
        return
    pending: deque[Future[Value]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix=name)
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
