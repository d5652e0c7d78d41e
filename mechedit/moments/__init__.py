"""Second moments E[k kᵀ] of the MLP keys over running text: what MEMIT preserves (§4.2, C₀ = λ·E[k kᵀ]).

Texts and layers go in, one `SecondMoment` per layer comes out. One pass over the text serves all layers, as far as
memory allows. A killed run can be resumed, and several processes can share the text.
"""

from mechedit.moments.accumulator import MomentAccumulator
from mechedit.moments.collect import collect_moments, collect_shard
from mechedit.moments.config import MomentsConfig
from mechedit.moments.convergence import Convergence
from mechedit.moments.convergence_file import curve_path
from mechedit.moments.dealt import collect_dealt
from mechedit.moments.load import load_moments
from mechedit.moments.memory import MomentsPlan, plan_moments
from mechedit.moments.merge import merge_moments
from mechedit.moments.npz_file import is_published, write_npz
from mechedit.moments.second_moment import SecondMoment, check_moments, moment_path

__all__ = [
    "Convergence",
    "MomentAccumulator",
    "MomentsConfig",
    "MomentsPlan",
    "SecondMoment",
    "check_moments",
    "collect_dealt",
    "collect_moments",
    "collect_shard",
    "curve_path",
    "is_published",
    "load_moments",
    "merge_moments",
    "moment_path",
    "plan_moments",
    "write_npz",
]
