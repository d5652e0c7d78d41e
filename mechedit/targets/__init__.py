"""z: the hidden states at the subjects' last tokens that make the model say the new objects (MEMIT Eq. 16).

Requests go in, `Targets` come out. For each fact, z = h + δ, where Adam finds the δ that minimizes

    mean over prefixes of −log P(object | prefix + prompt)  +  KL on "{subject} is a"  +  weight decay.

δ is added at one layer and kept within a ball of radius clamp·‖h‖. All that δ cannot change is computed once.
"""

from mechedit.targets.config import CONVENTIONS, Convention, TargetConfig, TargetSettings, check_one_unit
from mechedit.targets.search import check_target_shards, find_target_shard, find_targets, target_shards
from mechedit.targets.search_prompts import check_length
from mechedit.targets.subject_groups import regrouped
from mechedit.targets.targets import Targets

__all__ = [
    "CONVENTIONS",
    "Convention",
    "TargetConfig",
    "TargetSettings",
    "Targets",
    "check_length",
    "check_one_unit",
    "check_target_shards",
    "find_target_shard",
    "find_targets",
    "regrouped",
    "target_shards",
]
