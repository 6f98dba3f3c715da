"""Compiler passes, one file each, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable

from mpcserve.compiler.graph import Graph
from mpcserve.compiler.lookup import note_uses
from mpcserve.compiler.passes.fold_affine import fold_affine
from mpcserve.compiler.passes.fuse_activations import fuse_activations
from mpcserve.compiler.passes.fuse_attention import fuse_attention
from mpcserve.compiler.passes.fuse_clips import fuse_clips
from mpcserve.compiler.passes.fuse_normalizations import fuse_normalizations
from mpcserve.compiler.passes.fuse_shares import fuse_shares
from mpcserve.compiler.passes.fuse_softmax import fuse_softmax
from mpcserve.compiler.passes.identities import remove_identities
from mpcserve.compiler.passes.largest_early import largest_early
from mpcserve.compiler.passes.lift_masks import lift_masks
from mpcserve.compiler.passes.relu_after_maxpool import relu_after_maxpool
from mpcserve.compiler.passes.select_early import select_early

PASSES: tuple[Callable[[Graph], Graph], ...] = (
    note_uses,  # what an integer input may be follows from what it is used for
    select_early,  # of what is computed for all positions and read at one, that one
    remove_identities,  # Identity, Dropout, casts between floats: nothing to do
    fuse_activations,  # GELU, SiLU, Mish, softplus as they are written out become one node
    fuse_clips,  # so do a Relu and its upper end: two comparisons side by side
    fuse_normalizations,  # so do LayerNorm, RMSNorm and L2-normalisation
    fuse_softmax,  # and softmax, so that no exponential is too large
    fuse_shares,  # x − log Σ e^x, and its exponential, become LogSoftmax and Softmax
    largest_early,  # the largest share is that of the largest score
    lift_masks,  # what is public of a secret mask
    fuse_attention,  # masks become structure, softmax · values one node
    fold_affine,  # scalings, offsets, normalisations and means go into neighbouring weights
    relu_after_maxpool,  # Relu → MaxPool becomes MaxPool → Relu: fewer comparisons
)


def rewritten(graph: Graph) -> Graph:
    """The graph behind all passes."""
    for run in PASSES:
        graph = run(graph)
    return graph
