"""Data sets and models as tables."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from cli.render.text import ago, enum_text, facts, number, plain_table, size, when
from luthier.client import short_name
from luthier.v1.dataset_pb2 import Dataset, DatasetVersion, RowShape
from luthier.v1.model_pb2 import LineageNode, Model, ModelKind, ModelVersion

LABELS_SHOWN = 20


def datasets_table(datasets: Iterable[Dataset]) -> Table:
    """Data sets, one a line."""
    table = plain_table("data set", "latest", "made")
    for dataset in datasets:
        table.add_row(short_name(dataset.name), dataset.latest_version, ago(dataset.create_time))
    return table


def dataset_versions_table(versions: Iterable[DatasetVersion]) -> Table:
    """Versions of a data set, one a line."""
    table = plain_table("version", "rows", "splits", "from", "made", "content")
    for version in versions:
        table.add_row(
            short_name(version.name),
            str(version.row_count),
            ", ".join(f"{split.name} {split.row_count}" for split in version.splits),
            version.source_filename,
            ago(version.create_time),
            version.content_hash[:12],
        )
    return table


def dataset_view(version: DatasetVersion) -> Group:
    """Everything about a data set version."""
    schema, report = version.schema, version.report
    labels = ", ".join(schema.labels[:LABELS_SHOWN]) + (
        f" and {len(schema.labels) - LABELS_SHOWN} more" if len(schema.labels) > LABELS_SHOWN else ""
    )
    parts: list[RenderableType] = [
        facts(
            [
                ("version", short_name(version.name)),
                ("rows", version.row_count),
                ("shape", enum_text(RowShape.Name(schema.shape), "ROW_SHAPE_")),
                ("columns", ", ".join(f"{part} from {column}" for part, column in sorted(schema.columns.items()))),
                ("labels", labels),
                ("splits", ", ".join(f"{split.name} {split.row_count}" for split in version.splits)),
                ("repeated rows", report.duplicate_rows or ""),
                (
                    "characters",
                    f"{number(report.mean_characters)} on average, {report.max_characters} at most"
                    if report.max_characters
                    else "",
                ),
                ("from", version.source_filename),
                ("content", version.content_hash),
                ("files", version.uri),
                ("made", f"{when(version.create_time)} by {version.creator}" if version.creator else when(version.create_time)),
            ]
        )
    ]
    parts += [Text(f"note: {warning}", "yellow") for warning in report.warnings]
    return Group(*parts)


def models_table(models: Iterable[Model]) -> Table:
    """Models, one a line."""
    table = plain_table("model", "latest", "aliases", "made")
    for model in models:
        aliases = ", ".join(f"{alias} -> {version}" for alias, version in sorted(model.aliases.items()))
        table.add_row(short_name(model.name), model.latest_version, aliases, ago(model.create_time))
    return table


def model_versions_table(versions: Iterable[ModelVersion]) -> Table:
    """Versions of a model, one a line."""
    table = plain_table("version", "method", "base", "figures", "aliases", "made")
    for version in versions:
        table.add_row(
            short_name(version.name),
            version.method,
            version.base,
            ", ".join(f"{name} {number(value)}" for name, value in sorted(version.metrics.items())),
            ", ".join(version.aliases),
            ago(version.create_time),
        )
    return table


def model_view(version: ModelVersion) -> Table:
    """Everything about a model version."""
    lineage = version.lineage
    return facts(
        [
            ("version", short_name(version.name)),
            ("aliases", ", ".join(version.aliases)),
            ("kind", enum_text(ModelKind.Name(version.kind), "MODEL_KIND_") if version.kind else ""),
            ("method", version.method),
            ("base", version.base),
            ("job", short_name(lineage.job) if lineage.job else ""),
            ("data set", lineage.dataset_version),
            ("sweep", f"{short_name(lineage.sweep)}, {lineage.trial}" if lineage.sweep else ""),
            *((name, number(value)) for name, value in sorted(version.metrics.items())),
            ("size", size(version.size_bytes) if version.size_bytes else ""),
            ("content", version.content_hash),
            ("files", version.artifact_uri),
            ("base files", version.base_artifact_uri),
            ("made", when(version.create_time)),
        ]
    )


def lineage_tree(nodes: list[LineageNode]) -> Tree:
    """Where a version came from, as a tree with the version on top."""
    by_name = {node.name: node for node in nodes}

    def label(node: LineageNode) -> Text:
        text = Text(f"{node.kind} ", "dim").append(
            short_name(node.name) if node.name.startswith("projects/") else node.name, "bold"
        )
        return text.append(f"  {node.content_hash[:12]}", "dim") if node.content_hash else text

    def grow(tree: Tree, node: LineageNode, above: frozenset[str]) -> None:
        for parent in node.parents:
            if parent in by_name and parent not in above:
                grow(tree.add(label(by_name[parent])), by_name[parent], above | {parent})
            elif parent not in by_name:
                tree.add(Text(parent))

    root = Tree(label(nodes[0]))
    grow(root, nodes[0], frozenset({nodes[0].name}))
    return root
