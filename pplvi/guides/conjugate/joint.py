"""Which elements of normal blocks are joint: those that interact in a product of the program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pplvi.guides.conjugate.expectations import Blocks, same_entry
from pplvi.guides.conjugate.normal import BlockLayout, differing_axes
from pplvi.guides.conjugate.reading import Latent

MOST_JOINT = 5_000  # elements of a dense covariance


def block_layout(
    block: str, members: Sequence[str], latents: Mapping[str, Latent], blocks: Blocks, named: bool
) -> BlockLayout:
    """Where the elements of a normal block are: joint where pairs of them meet in a product, independent elsewhere.

    :param block: its name.
    :param members: its sites.
    :param latents: what is known of them.
    :param blocks: with the pairs that expectations use.
    :param named: whether the user named the block, which then may be joint across plates.
    :raises ValueError: if elements of a plate interact in a block that was not named, or too many do.
    """
    shapes = {site: tuple(latents[site].start.shape) for site in members}
    axes = _candidates(members, latents)
    every = axes | {s.name: tuple(d + 1 for d in axes[members[0]]) for s in blocks.series if s.members[0] in axes}
    own = [(a, b) for a, b in blocks.pairs if a.site in every and b.site in every]
    found = set().union(*(differing_axes(a, b, every, same_entry) for a, b in own)) if own else set()
    if not named or blocks.families[members[0]] == "lognormal":
        _refuse_plates(members[0], latents[members[0]], {axes[members[0]][i] for i in found})
    kept = {s: tuple(d for i, d in enumerate(axes[s]) if i not in found) for s in members}
    layout = BlockLayout(shapes, kept, next((s.name for s in blocks.series if s.members == tuple(members)), None))
    if (size := sum(layout.sizes.values())) > MOST_JOINT:
        raise ValueError(
            f"block {block!r} has {size:,} elements that interact, whose joint covariance would have {size**2:,} "
            f"entries: expected at most {MOST_JOINT:,}. "
            + ("Name smaller blocks, blocks=[...], or " if len(members) > 1 else "Name ")
            + f"fallback={{{', '.join(f'{m!r}: AutoNormal' for m in members)}}}, pyro.infer.autoguide.AutoNormal by "
            "gradient, or use another guide."
        )
    return layout


def _candidates(members: Sequence[str], latents: Mapping[str, Latent]) -> dict[str, tuple[int, ...]]:
    """Dimensions along which elements may be independent: all of a single site's, the common plates of several."""
    if len(members) == 1:
        return {members[0]: tuple(range(latents[members[0]].start.dim()))}
    names = set.intersection(*({p.name for p in latents[s].plates} for s in members))
    found = {}
    for site in members:
        start, plates = latents[site].start, [p for p in latents[site].plates if p.name in names]
        batch = start.dim() - latents[site].fn.event_dim
        found[site] = tuple(batch + p.dim for p in plates)
    return found


def _refuse_plates(name: str, found: Latent, interacting: set[int]) -> None:
    batch = found.start.dim() - found.fn.event_dim
    plates = {batch + p.dim: p.name for p in found.plates}
    if bad := [plates.get(d, f"batch dimension {d - batch}") for d in interacting if d < batch]:
        raise ValueError(
            f"the elements of site {name!r} along {bad} interact in the model (a sum over them meets one datum), so "
            f"independent updates of them would not rise: expected independent elements of a plate. Name the joint "
            f"block, blocks=[({name!r},)], or declare the dimension with .to_event() in place of the plate."
        )
