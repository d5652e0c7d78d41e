"""Select the critical layer range from effects, with the evidence for it.

Restoring the subject's last token at layer l lets the MLPs above l recall the fact; with MLPs severed they
cannot. So gap(l) = AIE(l) − AIE_mlp-severed(l) is what the MLPs above layer l do at that token, and
c(l) = gap(l−1) − gap(l) is what the MLP of layer l adds. (MEMIT takes the layers where the gap is largest, Appendix A,
and sees it diminish after the last of them, §4.1; by which rule, it does not say.) Each rule turns them into a
contiguous range; bootstrap resamples of the facts show how stable it is, and a test over all layers at once shows
whether there is anything to select.
"""

from mechedit.selection.config import SelectConfig
from mechedit.selection.curves import subject_effects
from mechedit.selection.evidence import LayerEvidence
from mechedit.selection.rules import RULES, moving_width
from mechedit.selection.select import Candidate, RuleSelection, Selection, State, select_layers

__all__ = [
    "RULES",
    "Candidate",
    "LayerEvidence",
    "RuleSelection",
    "SelectConfig",
    "Selection",
    "State",
    "moving_width",
    "select_layers",
    "subject_effects",
]
