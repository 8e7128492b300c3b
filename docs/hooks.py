"""What `mkdocs build` generates: the reference of commands, settings and the Python class, from the code itself.

Nothing of it is written by hand, and nothing is fetched. torch is not imported: the command line has its signatures
apart, and the Python class is read as text. The files beside docs/ that pages link to become pages of the site.
"""

import ast
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the reference is that of this checkout, whatever is installed

from metadiff_cli.app import app  # noqa: E402
from metadiff_cli.config.schema import Config  # noqa: E402

API = ROOT / "metadiff_cli" / "api.py"
BESIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")  # in the root of the repository
ANY = 2**60  # a limit that large is none that a person meets
PYTHON = "<!-- reference: FewShotClassifier -->"  # a line of docs/python.md


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages, and those that are beside docs/. Called by MkDocs."""
    from mkdocs.structure.files import File

    for name, text in generated().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Fill in the reference of the Python class, and turn links out of docs/ to the pages above. Called by MkDocs."""
    markdown = re.sub(r"\]\(\.\./README\.md(#[\w-]*)?\)", "](index.md)", markdown)
    for name in BESIDE:
        markdown = markdown.replace(f"](../{name}", f"]({name.lower()}")
    return markdown.replace(PYTHON, python_reference())


def generated() -> dict[str, str]:
    """All pages that are not files in docs/, by name."""
    pages = {"reference/commands.md": commands_reference(), "reference/settings.md": settings_reference()}
    for name in BESIDE:
        # links of such a file are relative to the root, and so to a folder above docs/
        text = re.sub(r"\]\(docs/([\w-]+\.md)", r"](\1", (ROOT / name).read_text(encoding="utf-8"))
        for other in BESIDE:
            text = text.replace(f"]({other}", f"]({other.lower()}")
        pages[name.lower()] = text
    return pages


def commands_reference() -> str:
    """Every command with its help text, its examples and its options."""
    root: Any = typer.main.get_command(app)
    lines = ["# Commands", "", "Made from `--help` of each command.", ""]
    for name, command in commands(root, "metadiff"):
        lines += [f"## {name}", "", *_help(command), *_options(command)]
    return "\n".join(lines) + "\n"


def commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The command and all below it, with their full names."""
    yield name, command
    for word, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{name} {word}")


def _help(command: Any) -> list[str]:
    """The text of the help, and the examples as a block of code."""
    text, _, examples = inspect.cleandoc(command.help or "").partition("Examples:")
    typed = [line.strip() for line in examples.splitlines() if line.strip()]
    return [plain(text).strip(), "", "```sh", *typed, "```", ""] if typed else [plain(text), ""]


def _options(command: Any) -> list[str]:
    """A table per group of options; arguments come first."""
    groups: dict[str, list[str]] = {}
    for option in command.params:
        group = "Arguments" if option.param_type_name == "argument" else getattr(option, "rich_help_panel", None)
        groups.setdefault(group or "Options", []).append(_row(option))
    ordered = sorted(groups, key=lambda group: group != "Arguments")  # stable: the others keep their order
    return [line for group in ordered for line in (f"**{group}**", "", "| | |", "|---|---|", *groups[group], "")]


def _row(option: Any) -> str:
    if option.param_type_name == "argument":
        names = f"`{option.metavar or option.name.upper()}`"
    else:
        value = "" if option.is_flag else f" {option.metavar or option.type.name.upper()}"
        names = ", ".join(f"`{name}{value}`" for name in [*option.opts, *option.secondary_opts])
    text = plain(option.help or "")
    shown = option.default not in (None, False, [], ()) and not callable(option.default) and "[default:" not in text
    return f"| {names} | {cell(text)}{f' [default: {option.default}]' if shown else ''} |"


def settings_reference() -> str:
    """Every setting with its type, its limits and its default."""
    lines = [
        "# Settings", "",
        "Made from the schema of the configuration. The setting `pretrain.epochs` is `--set pretrain.epochs=3` on the "
        "command line, `METADIFF_PRETRAIN__EPOCHS=3` in the environment, and nested in a YAML file.", "",
    ]  # fmt: skip
    for name, section in sections(Config, ""):
        lines += [f"## {name or 'General'}", "", plain(inspect.getdoc(section) or ""), ""]
        if rows := list(_settings(name, section)):
            lines += ["| key | value | default | |", "|---|---|---|---|", *rows, ""]
    return "\n".join(lines) + "\n"


def sections(model: type[BaseModel], name: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """The section and all sections inside it, with the keys that lead there."""
    yield name, model
    for key, field in model.model_fields.items():
        if inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel):
            yield from sections(field.annotation, f"{name}.{key}".lstrip("."))


def _settings(name: str, section: type[BaseModel]) -> Iterator[str]:
    schema, notes = section.model_json_schema(), comments(section)
    for key, field in section.model_fields.items():
        if not (inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel)):
            default, described = field.get_default(), schema["properties"][key]
            shown = default if isinstance(default, str) else json.dumps(default)  # as YAML writes it
            note = notes.get(key) or described.get("description", "")
            full = f"{name}.{key}".lstrip(".")
            yield f"| `{full}` | {cell(value(described))} | {shown and f'`{shown}`'} | {cell(note)} |"


def value(schema: dict[str, Any]) -> str:
    """What a setting takes, in words."""
    if "anyOf" in schema:
        return " or ".join(value(choice) for choice in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{choice}`" for choice in schema.get("enum", [schema.get("const")]))
    kind = {"integer": "whole number", "boolean": "true or false", "string": "text", "array": "list"}
    text = kind.get(schema["type"], schema["type"])
    bounds = {"minimum": "from {}", "exclusiveMinimum": "above {}", "maximum": "to {}", "exclusiveMaximum": "below {}"}
    said = [words.format(f"{schema[key]:,}") for key, words in bounds.items() if abs(schema.get(key, ANY)) < ANY]
    return " ".join([text, *said])


def comments(section: type[BaseModel]) -> dict[str, str]:
    """The comment beside each field of a section, or on the lines above it."""
    found: dict[str, str] = {}
    for cls in reversed(section.__mro__[: section.__mro__.index(BaseModel)]):
        above = ""
        for line in inspect.getsource(cls).splitlines():
            field = re.match(r"    (\w+): [^#]*(?:#\s*(.*))?$", line)
            if field is not None and (field[2] or above):
                found[field[1]] = field[2] or above
            comment = re.match(r"    # (.*)", line)
            above = f"{above} {comment[1]}".strip() if comment else ""
    return found


def python_reference() -> str:
    """The Python class with its public methods, from their signatures and docstrings."""
    tree = ast.parse(API.read_text(encoding="utf-8"))
    cls = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "FewShotClassifier")
    lines = [f"## {cls.name}", "", numpydoc(ast.get_docstring(cls) or ""), ""]
    for method in cls.body:
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
            given = ast.unparse(method.args).removeprefix("self, ").removeprefix("cls, ").removeprefix("self")
            returns = f" -> {ast.unparse(method.returns)}" if method.returns is not None else ""
            lines += [f"### {method.name}", "", "```python", f"{method.name}({given}){returns}", "```", ""]
            lines += [numpydoc(ast.get_docstring(method) or ""), ""]
    return "\n".join(lines)


def numpydoc(text: str) -> str:
    """A docstring in NumPy's form as Markdown: headings in bold, a list of the names below them."""
    text = re.sub(r"^(.+)\n-{3,}$", r"**\1**\n", text, flags=re.M)
    return re.sub(r"^(\w+) : (.*)$", r"- `\1`: \2", text, flags=re.M)


def plain(text: str) -> str:
    """A help text without the escapes that Rich wants, and without Markdown's own characters."""
    return text.replace("\\[", "[").replace("*", "\\*").replace("<", "&lt;")


def cell(text: str) -> str:
    """The text as one cell of a table."""
    return " ".join(text.replace("|", "&#124;").split())
