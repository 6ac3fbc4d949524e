"""Writes docs/reference, from the protos' comments and the settings: `make docs`, or `python docs/reference.py DIR`."""

import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import reference_settings
from google.protobuf import descriptor_pb2
from grpc_tools import protoc

ROOT = Path(__file__).parent.parent
_FIELD = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    _FIELD.TYPE_DOUBLE: "double",
    _FIELD.TYPE_FLOAT: "float",
    _FIELD.TYPE_INT64: "int64",
    _FIELD.TYPE_UINT64: "uint64",
    _FIELD.TYPE_INT32: "int32",
    _FIELD.TYPE_UINT32: "uint32",
    _FIELD.TYPE_BOOL: "bool",
    _FIELD.TYPE_STRING: "string",
    _FIELD.TYPE_BYTES: "bytes",
}
# Numbers of the fields that source info's paths are made of (descriptor.proto).
_FILE_MESSAGE, _FILE_ENUM, _FILE_SERVICE = 4, 5, 6
_MESSAGE_FIELD, _MESSAGE_MESSAGE, _MESSAGE_ENUM = 2, 3, 4
_ENUM_VALUE, _SERVICE_METHOD = 2, 2

SourcePath = tuple[int, ...]


@dataclass
class Package:
    """All files of one proto package, as one page."""

    name: str
    files: list[descriptor_pb2.FileDescriptorProto] = field(default_factory=list)

    @property
    def page(self) -> str:
        """`tiltyard.registry.v1` is told in registry.md."""
        return f"{self.name.removeprefix('tiltyard.').split('.')[0]}.md"


def packages() -> list[Package]:
    """The contract's packages in the order of their names."""
    files = sorted(str(path.relative_to(ROOT / "protos")) for path in (ROOT / "protos").rglob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "all.binpb"
        arguments = ["protoc", f"-I{ROOT / 'protos'}", f"-I{_well_known()}", "--include_source_info"]
        if protoc.main([*arguments, f"--descriptor_set_out={out}", *files]) != 0:
            raise SystemExit("protoc refuses the protos")
        found: dict[str, Package] = {}
        for file in descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file:
            found.setdefault(file.package, Package(file.package)).files.append(file)
    return [found[name] for name in sorted(found)]


def _well_known() -> Path:
    return Path(protoc.__file__).parent / "_proto"


def pages() -> dict[str, str]:
    """Each page's text by its name."""
    found = packages()
    homes = {f".{each.name}": each.page for each in found}
    written = {each.page: "\n".join(_page(each, homes)).rstrip() + "\n" for each in found}
    return {"README.md": _index(found), "settings.md": reference_settings.page(), **written}


def _index(found: Sequence[Package]) -> str:
    lines = [
        "# Reference",
        "",
        "Made from the comments of `protos/` by `make docs`. What services can be told: [settings](settings.md).",
        "",
        "| package | services |",
        "|---|---|",
    ]
    for each in found:
        services = [service.name for file in each.files for service in file.service]
        linked = ", ".join(f"[{name}]({each.page}#{name.lower()})" for name in services)
        lines.append(f"| [{each.name}]({each.page}) | {linked or 'messages of the others'} |")
    return "\n".join(lines) + "\n"


def _page(package: Package, homes: dict[str, str]) -> Iterator[str]:
    yield f"# {package.name}"
    yield ""
    for file in package.files:
        comments = _comments(file)
        for number, service in enumerate(file.service):
            yield from _service(service, (_FILE_SERVICE, number), comments, package, homes)
    for file in package.files:
        comments = _comments(file)
        for number, message in enumerate(file.message_type):
            yield from _message(message, message.name, (_FILE_MESSAGE, number), comments, package, homes)
        for number, enum in enumerate(file.enum_type):
            yield from _enum(enum, enum.name, (_FILE_ENUM, number), comments)


def _service(
    service: descriptor_pb2.ServiceDescriptorProto,
    path: SourcePath,
    comments: dict[SourcePath, str],
    package: Package,
    homes: dict[str, str],
) -> Iterator[str]:
    yield f"## {service.name}"
    yield ""
    yield comments.get(path, "")
    yield ""
    for number, method in enumerate(service.method):
        request = f"{'stream ' if method.client_streaming else ''}{_linked(method.input_type, package, homes)}"
        answer = f"{'stream ' if method.server_streaming else ''}{_linked(method.output_type, package, homes)}"
        yield f"### {service.name}/{method.name}"
        yield ""
        yield f"{request} → {answer}"
        yield ""
        yield comments.get((*path, _SERVICE_METHOD, number), "")
        yield ""


def _message(
    message: descriptor_pb2.DescriptorProto,
    name: str,
    path: SourcePath,
    comments: dict[SourcePath, str],
    package: Package,
    homes: dict[str, str],
) -> Iterator[str]:
    yield f"## {name}"
    yield ""
    yield comments.get(path, "")
    yield ""
    maps = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
    if message.field:
        yield "| field | type | |"
        yield "|---|---|---|"
    for number, each in enumerate(message.field):
        told = _cell(comments.get((*path, _MESSAGE_FIELD, number), ""))
        if each.HasField("oneof_index") and not each.proto3_optional:
            told += f" One of `{message.oneof_decl[each.oneof_index].name}`."
        entry = maps.get(each.type_name.rpartition(".")[2])
        if entry is not None:
            kind = f"map of {_type(entry.field[0], package, homes)} to {_type(entry.field[1], package, homes)}"
        else:
            kind = _type(each, package, homes)
            kind = f"repeated {kind}" if each.label == _FIELD.LABEL_REPEATED else kind
        yield f"| `{each.name}` | {kind} | {told} |"
    if message.field:
        yield ""
    for number, nested in enumerate(message.nested_type):
        if nested.name not in maps:
            inner = (*path, _MESSAGE_MESSAGE, number)
            yield from _message(nested, f"{name}.{nested.name}", inner, comments, package, homes)
    for number, enum in enumerate(message.enum_type):
        yield from _enum(enum, f"{name}.{enum.name}", (*path, _MESSAGE_ENUM, number), comments)


def _enum(
    enum: descriptor_pb2.EnumDescriptorProto, name: str, path: SourcePath, comments: dict[SourcePath, str]
) -> Iterator[str]:
    yield f"## {name}"
    yield ""
    yield comments.get(path, "")
    yield ""
    yield "| value | | |"
    yield "|---|---|---|"
    for number, value in enumerate(enum.value):
        yield f"| `{value.name}` | {value.number} | {_cell(comments.get((*path, _ENUM_VALUE, number), ''))} |"
    yield ""


def _type(each: descriptor_pb2.FieldDescriptorProto, package: Package, homes: dict[str, str]) -> str:
    return _SCALARS.get(each.type) or _linked(each.type_name, package, homes)


def _linked(type_name: str, package: Package, homes: dict[str, str]) -> str:
    """`.tiltyard.type.v1.Task` as a link; a type that is not ours by its full name."""
    home = next((known for known in homes if type_name.startswith(f"{known}.")), None)
    if home is None:
        return type_name.removeprefix(".")
    name = type_name.removeprefix(f"{home}.")
    page = "" if homes[home] == package.page else homes[home]
    return f"[{name}]({page}#{name.lower().replace('.', '')})"


def _comments(file: descriptor_pb2.FileDescriptorProto) -> dict[SourcePath, str]:
    found = {}
    for location in file.source_code_info.location:
        if location.leading_comments:
            lines = [line.removeprefix(" ").rstrip() for line in location.leading_comments.strip("\n").split("\n")]
            found[tuple(location.path)] = re.sub(r"([*<])", r"\\\1", "\n".join(lines).strip())
    return found


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> None:
    """Writes the pages into the folder named as the argument, docs/reference by default; removes others."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "reference"
    folder.mkdir(parents=True, exist_ok=True)
    written = pages()
    for old in folder.glob("*.md"):
        if old.name not in written:
            old.unlink()
    for name, text in written.items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    main()
