"""Language models with named sites, the same for every architecture and on both backends.

The interface is `Model` (`protocol`), with its `sites` and `kv_cache`; `loading` makes one and `self_check` tests it.
Behind it, `backend` holds weight-sharing copies of the transformers model (`shared_copy`), whose parts (`family`) are
in the table of `families` or measured by `discovery`; what cannot be used is `unsupported`. A run is a `run_plan`,
carried out by the first engine that can: `fast_engine`, in the way that `engine_check` settles when a model is loaded,
or one of `engines`, which the two backends complete; where a prefix cannot be cut off, it is `run_again`. Two more
backends have models whose weights are not in this process alone: `tensor_parallel_backend`, and
`remote_backend`. Who may use a model now is up to its `model_lock`. What a model costs follows from its `shapes`, which
a config alone has, and is measured on `few_blocks`. Nothing outside this package imports transformer_lens or nnsight,
or names a transformers class.
"""

from mechedit.models.families import loader_of
from mechedit.models.few_blocks import few_random_blocks
from mechedit.models.kv_cache import KVCache
from mechedit.models.layer_ranges import MOST_LAYERS, layer_numbers, read_layer_range
from mechedit.models.loading import load_model, transformers_model
from mechedit.models.model_lock import exclusive
from mechedit.models.protocol import Model, Patch, Resume, Run, Tokens
from mechedit.models.readout import CleanLogits, Readout, TokenScores, WholeReadout, log_probabilities
from mechedit.models.shapes import BlockShapes, ModelShapes
from mechedit.models.sites import EMBED, MODULES, Module, Part, Site, out_part
from mechedit.models.unsupported import UnsupportedModelError
from mechedit.models.weights_hash import DTYPES

__all__ = [
    "DTYPES",
    "EMBED",
    "MODULES",
    "MOST_LAYERS",
    "BlockShapes",
    "CleanLogits",
    "KVCache",
    "Model",
    "ModelShapes",
    "Module",
    "Part",
    "Patch",
    "Readout",
    "Resume",
    "Run",
    "Site",
    "TokenScores",
    "Tokens",
    "UnsupportedModelError",
    "WholeReadout",
    "exclusive",
    "few_random_blocks",
    "layer_numbers",
    "load_model",
    "loader_of",
    "log_probabilities",
    "out_part",
    "read_layer_range",
    "transformers_model",
]
