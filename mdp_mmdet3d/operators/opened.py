"""Kinds some of whose attributes are widths to choose: the embedding width, the number of queries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

from mdp_mmdet3d.operators.attention import Attention
from mdp_mmdet3d.operators.base import Attribute, GraphBuilder, OperatorKind, OperatorSignature, Work
from mdp_mmdet3d.operators.ffn import Ffn
from mdp_mmdet3d.operators.linear import Linear

if TYPE_CHECKING:
    from torch import Tensor

EMBED_WIDTH, QUERIES = "embed_width", "queries"
SAMPLES = 3  # widths of such a role in a latency table


class Opened(OperatorKind):
    """A kind that is another one as soon as its last roles have widths.

    Attributes:
        base: The other one.
        opened: Its attributes that are roles here, by the name of the role.
    """

    base: ClassVar[OperatorKind]
    opened: ClassVar[Mapping[str, str]]

    def __init_subclass__(cls) -> None:
        cls.roles = (*cls.base.roles, *cls.opened)
        cls.attributes = tuple(name for name in cls.base.attributes if name not in cls.opened.values())
        cls.optional = cls.base.optional
        cls.samples = {**cls.base.samples, **dict.fromkeys(cls.opened, SAMPLES)}
        cls.whole_roles = cls.base.whole_roles

    def canonical(self, attributes: Mapping[str, Attribute]) -> dict[str, Attribute]:
        """As those of the base."""
        return self.base.canonical(attributes)

    def closed(
        self, signature: OperatorSignature, widths: tuple[int, ...]
    ) -> tuple[OperatorSignature, tuple[int, ...]]:
        """Signature and widths of the base at ``widths``."""
        own = len(self.base.roles)
        found = zip(self.opened.values(), widths[own:], strict=True)
        attributes = {**dict(signature.attributes), **dict(found)}
        return OperatorSignature.make(self.base.name, **attributes), widths[:own]

    def deployed_widths(self, signature: OperatorSignature, widths: tuple[int, ...], precision: str) -> tuple[int, ...]:
        """As those of the base."""
        base, own = self.closed(signature, widths)
        return (*self.base.deployed_widths(base, own, precision), *widths[len(own) :])

    def work(self, signature: OperatorSignature, widths: tuple[int, ...]) -> Work:
        """That of the base."""
        return self.base.work(*self.closed(signature, widths))

    def graph(self, build: GraphBuilder, signature: OperatorSignature, widths: tuple[int, ...]) -> int:
        """That of the base."""
        return self.base.graph(build, *self.closed(signature, widths))

    def torch_call(
        self, signature: OperatorSignature, widths: tuple[int, ...]
    ) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """That of the base."""
        return self.base.torch_call(*self.closed(signature, widths))


class StreamAttention(Opened):
    """`Attention` whose stream has a width to choose."""

    name = "stream_attention"
    base = Attention()
    opened: ClassVar[Mapping[str, str]] = {EMBED_WIDTH: "embed_dims"}


class StreamFfn(Opened):
    """`Ffn` whose stream has a width to choose."""

    name = "stream_ffn"
    base = Ffn()
    opened: ClassVar[Mapping[str, str]] = {EMBED_WIDTH: "embed_dims"}


class QueryAttention(Opened):
    """`Attention` of a number of queries to choose; where it is ``shared``, ``keys`` are those beside the queries."""

    name = "query_attention"
    base = Attention()
    opened: ClassVar[Mapping[str, str]] = {QUERIES: "queries"}

    def closed(
        self, signature: OperatorSignature, widths: tuple[int, ...]
    ) -> tuple[OperatorSignature, tuple[int, ...]]:
        """The queries are keys too where it is ``shared``."""
        base, own = super().closed(signature, widths)
        if not base["shared"]:
            return base, own
        keys = base["keys"] + base["queries"]
        return OperatorSignature.make(base.kind, **{**dict(base.attributes), "keys": keys}), own


class QueryStreamAttention(QueryAttention):
    """`QueryAttention` whose stream has a width to choose as well."""

    name = "query_stream_attention"
    opened: ClassVar[Mapping[str, str]] = {EMBED_WIDTH: "embed_dims", QUERIES: "queries"}


class QueryFfn(Opened):
    """`Ffn` on a number of queries to choose."""

    name = "query_ffn"
    base = Ffn()
    opened: ClassVar[Mapping[str, str]] = {QUERIES: "tokens"}


class QueryStreamFfn(Opened):
    """`QueryFfn` whose stream has a width to choose as well."""

    name = "query_stream_ffn"
    base = Ffn()
    opened: ClassVar[Mapping[str, str]] = {EMBED_WIDTH: "embed_dims", QUERIES: "tokens"}


class QueryLinear(Opened):
    """`Linear` on a number of queries to choose."""

    name = "query_linear"
    base = Linear()
    opened: ClassVar[Mapping[str, str]] = {QUERIES: "tokens"}


OPENED = (
    StreamAttention(), StreamFfn(), QueryAttention(), QueryStreamAttention(), QueryFfn(), QueryStreamFfn(),
    QueryLinear(),
)  # fmt: skip


def with_queries(kind: str) -> str:
    """Kind like ``kind`` with `QUERIES` as its last role."""
    return f"query_{kind}"
