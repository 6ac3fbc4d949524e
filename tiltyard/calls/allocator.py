"""Lets the memory of one message serve the next, instead of being given back to the kernel and asked for again."""

_LARGER_THAN_A_MESSAGE = 8 * 1024 * 1024


def keep_message_memory() -> None:
    """To be called before messages of a megabyte pass through this process; once more does nothing.

    glibc gives back what is freed at the end of its heap, beyond twice the largest block that it has had to map by
    itself (mallopt(3), M_MMAP_THRESHOLD). A message of 1 MiB has several copies on its way, and each of them costs a
    page fault for every 4 KiB, which takes longer than its SHA-256. One larger block that is freed raises both limits.
    No other allocator minds.
    """
    block = bytes(_LARGER_THAN_A_MESSAGE)  # of zeros, which no page is touched for
    del block
