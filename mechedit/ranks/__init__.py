"""The processes that run one command: which of them this is, who does what, and how results come together.

`torchrun` and `accelerate launch` start N processes of one command, which differ in their rank alone. `joined` brings
them together, through torch.distributed; `current()` is their group wherever work can be dealt out. Without them it is
a group of one, in which every method is the identity.

All processes run the same steps in the same order. Where they meet, each says at which step it is, and looks whether
the others still live: a process that fails leaves its message for the others, and one that has died leaves no sign of
life for `timeout` seconds. Nobody waits for ever.
"""

from mechedit.ranks.group import SINGLE, Group, RankFailed, alone, current
from mechedit.ranks.joining import joined
from mechedit.ranks.processes import TIMEOUT_VARIABLE, Processes

__all__ = ["SINGLE", "TIMEOUT_VARIABLE", "Group", "Processes", "RankFailed", "alone", "current", "joined"]
