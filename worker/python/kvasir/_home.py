"""What a batch and the sequences that it stepped share: who may close one of them, and when."""

import contextlib
import threading

from .errors import KvasirError


class Home:
    """
    Of a batch. On a GPU the sequences that it stepped last are on its stream, so closing one of
    them waits for calls on all. members: these, and after a call that failed also those that it
    was for, or that it was to take the place of: which of them is the library's to know.
    A sequence's homes are those whose member it is.
    """

    def __init__(self):
        self.lock = threading.RLock()  # for those that close
        self.handle, self.members = None, ()

    def admit(self, sequences):
        """Before a call on them, which may make them the batch's. Inside the batch's handle."""
        if tuple(sequences) == self.members:
            return
        for sequence in sequences:
            if self not in sequence.homes:
                sequence.homes.append(self)
        every = {id(s): s for s in (*self.members, *sequences)}
        self.members = tuple(every.values())

    def keep(self, sequences):
        """They are the batch's now, and no others. Inside the batch's handle."""
        if tuple(sequences) == self.members:
            return
        gone, stay = self.members, {id(s) for s in sequences}
        self.members = tuple(sequences)
        for sequence in gone:
            if id(sequence) not in stay and self in sequence.homes:
                sequence.homes.remove(self)


@contextlib.contextmanager
def alone(homes):
    """
    No call on what is open of them runs inside. Locks, then batches, then sequences are taken in
    one order by all who take several; members are looked at when no call can change them.
    """
    homes = sorted(homes, key=id)
    with contextlib.ExitStack() as held:
        for home in homes:
            held.enter_context(home.lock)
        for home in homes:
            _enter(held, home.handle)
        members = {id(s): s for home in homes for s in home.members}
        for key in sorted(members):
            _enter(held, members[key].handle)
        yield


def _enter(held, handle):
    with contextlib.suppress(KvasirError):  # it is closed
        held.enter_context(handle)
