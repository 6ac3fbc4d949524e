"""The examples in Go and Java name packages, messages, fields, methods and enum values that the contract has.

Neither language is at hand here, so nothing compiles them: what is regular in them is read, and held against the
descriptors.
"""

import importlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import pytest
import yaml
from google.protobuf.descriptor import (
    Descriptor,
    EnumDescriptor,
    FieldDescriptor,
    FileDescriptor,
    MethodDescriptor,
    ServiceDescriptor,
)
from google.rpc import error_details_pb2

import tiltyard
from tiltyard.identity import Key
from tiltyard.statements import sign_statement
from tiltyard.type.v1 import envelope_pb2

ROOT = Path(__file__).parents[2]
GO = ROOT / "clients/go"
JAVA = ROOT / "clients/java"

T = TypeVar("T")
Named = Descriptor | EnumDescriptor | ServiceDescriptor


def files() -> Iterator[FileDescriptor]:
    package = Path(next(iter(tiltyard.__path__)))
    for path in sorted(package.rglob("*_pb2.py")):
        module = importlib.import_module(".".join(path.relative_to(package.parent).with_suffix("").parts))
        yield module.DESCRIPTOR


def names_by_package() -> dict[str, dict[str, Named]]:
    packages: dict[str, dict[str, Named]] = {}
    for file in files():
        names = packages.setdefault(file.package, {})
        for kind in (file.message_types_by_name, file.enum_types_by_name, file.services_by_name):
            names.update(kind)
    return packages


PACKAGES = names_by_package()
FOLDERS = {str(Path(file.name).parent): file.package for file in files()}


def camel(name: str) -> str:
    return "".join(part[:1].upper() + part[1:] for part in name.split("_"))


def message_in(names: Mapping[str, Named], name: str) -> Descriptor | None:
    found = names.get(name)
    return found if isinstance(found, Descriptor) else None


def fields(message: Descriptor) -> dict[str, FieldDescriptor]:
    """The fields of a message by their names in Go and, after `set` or `get`, in Java."""
    return {camel(each.name): each for each in message.fields}


def closed(text: str, opened: int) -> int:
    """Where the bracket at `opened` is closed."""
    depth = 0
    for at in range(opened, len(text)):
        depth += (text[at] in "({[") - (text[at] in ")}]")
        if not depth:
            return at
    raise ValueError("a bracket is never closed")


def shallow(text: str) -> str:
    """`text` without what stands in brackets."""
    while (shorter := re.sub(r"\([^()]*\)|\{[^{}]*\}|\[[^\[\]]*\]", "", text)) != text:
        text = shorter
    return text


class Reading:
    """One source: how much of it was held against the contract, what is not there, and what its variables are."""

    def __init__(self) -> None:
        self.held = 0
        self.wrong: list[str] = []
        self.types: dict[str, Descriptor] = {}

    def hold(self, names: Mapping[str, T], name: str) -> T | None:
        """What is called `name`, which is wrong when nothing is."""
        self.held += 1
        if name not in names:
            self.wrong.append(name)
        return names.get(name)

    def request(self, method: MethodDescriptor, given: Descriptor | None) -> None:
        """A method is called with a message of this type."""
        self.held += 1
        if given is not method.input_type:
            self.wrong.append(f"{method.full_name} takes {method.input_type.name}")

    def chain(self, start: Descriptor | None, names: Iterable[str]) -> Descriptor | None:
        """Fields one within the other; the message of the last, if it is one."""
        for name in names:
            if start is None:
                self.wrong.append(f"{name} of what has no fields")
                return None
            found = self.hold(fields(start), name)
            start = None if found is None else found.message_type
        return start


def read_go(source: str) -> Reading:
    reading = Reading()
    code = re.sub(r"//.*", "", source)
    prefix = yaml.safe_load((GO / "buf.gen.yaml").read_text())["managed"]["override"][0]["value"]
    packages: dict[str, Mapping[str, Named]] = {"errdetails": error_details_pb2.DESCRIPTOR.message_types_by_name}
    for alias, path in re.findall(r'^\s+(\w+) "example.com/arena/([^"]+)"$', code, flags=re.MULTILINE):
        folder = f"example.com/arena/{path}".removeprefix(f"{prefix}/")
        packages[alias] = PACKAGES.get(reading.hold(FOLDERS, folder) or "", {})
    for alias, name in re.findall(rf"\b({'|'.join(packages)})\.([A-Z]\w*)", code):
        enum, _, value = name.partition("_")
        if service := re.fullmatch("New(.+)Client", name):
            reading.hold(packages[alias], service[1])
        elif value:
            found = reading.hold(packages[alias], enum)
            reading.hold(found.values_by_name if isinstance(found, EnumDescriptor) else {}, value)
        else:
            reading.hold(packages[alias], name)
    for literal in re.finditer(r"(?:(\w+) := )?&(\w+)\.(\w+)\{", code):
        variable, alias, name = literal.groups()
        if message := message_in(packages.get(alias, {}), name):
            if variable:
                reading.types[variable] = message
            for key in re.findall(r"(\w+):", shallow(code[literal.end() : closed(code, literal.end() - 1)])):
                reading.hold(fields(message), key)
    calls = r"(?:(\w+), err := |:= )(\w+)\.New(\w+)Client\(\w+\)\.(\w+)\(\w+, (?:&\w+\.)?(\w+)"
    for variable, alias, name, method_name, given in re.findall(calls, code):
        service = packages.get(alias, {}).get(name)
        methods = service.methods_by_name if isinstance(service, ServiceDescriptor) else {}
        if method := reading.hold(methods, method_name):
            reading.request(method, reading.types.get(given) or message_in(packages[alias], given))
            if variable:
                reading.types[variable] = method.output_type
    for variable, start, name in re.findall(r"for _, (\w+) := range (\w+)\.(\w+)", code):
        if start in reading.types and (message := reading.chain(reading.types[start], [name])):
            reading.types[variable] = message
    for variable, names in re.findall(r"\b(\w+)((?:\.[A-Z]\w*)+)", code):
        if variable in reading.types:
            reading.chain(reading.types[variable], names[1:].split("."))
    return reading


def read_java(source: str) -> Reading:
    reading = Reading()
    code = re.sub(r"//.*", "", source)
    overrides = yaml.safe_load((JAVA / "buf.gen.yaml").read_text())["managed"]["override"]
    prefix = next(each["value"] for each in overrides if each["file_option"] == "java_package_prefix")
    names: dict[str, Named] = {}
    for package, name in re.findall(r"^import org\.example\.([\w.]+)\.(\w+);$", code, flags=re.MULTILINE):
        bare = name.removesuffix("Grpc")
        inside = reading.hold(PACKAGES, f"org.example.{package}".removeprefix(f"{prefix}."))
        if inside is not None and (found := reading.hold(inside, bare)):
            names[bare] = found
    building: list[Descriptor | None] = []
    for name, verb, target in re.findall(r"\b(\w+)\.newBuilder\(\)|\.(set|build)(\w*)\(", code):
        if name:
            building.append(message_in(names, name))
        elif building and verb == "build":
            building.pop()
        elif building:
            reading.chain(building[-1], [target])
    for name, value in re.findall(r"\b([A-Z]\w*)\.([A-Z][A-Z_]+)\b", code):
        if isinstance(enum := names.get(name), EnumDescriptor):
            reading.hold(enum.values_by_name, value)
    for stub in re.finditer(r"(?:var (\w+) = )?(\w+)Grpc\.newBlockingStub\(\w+\)", code):
        service = names.get(stub[2])
        methods = service.methods_by_name if isinstance(service, ServiceDescriptor) else {}
        call = re.compile(r"(?:\s*\.with\w+\([^()]*\))*\s*\.(\w+)\(\s*(\w+)").match(code, stub.end())
        assert call is not None
        method = reading.hold(methods, call[1][0].upper() + call[1][1:])
        if method is None:
            continue
        reading.request(method, message_in(names, call[2]))
        if stub[1]:
            reading.types[stub[1]] = method.output_type
        after = code[closed(code, code.index("(", call.end(1))) + 1 :]
        each = re.match(r"\s*\.get(\w+)List\(\)\s*\.forEach\((\w+) ->", after)
        if each and (message := reading.chain(method.output_type, [each[1]])):
            reading.types[each[2]] = message
    for variable, getters in re.findall(r"\b(\w+)((?:\.get\w+\(\))+)", code):
        if variable in reading.types:
            reading.chain(reading.types[variable], re.findall(r"\.get(\w+)\(\)", getters))
    return reading


EXAMPLES = [(read_go, GO / "example.go"), (read_java, JAVA / "Example.java")]


@pytest.mark.parametrize(("read", "path"), EXAMPLES)
def test_an_example_names_what_the_contract_has(read: Callable[[str], Reading], path: Path) -> None:
    reading = read(path.read_text())
    assert reading.wrong == []
    assert reading.held > 30


@pytest.mark.parametrize(
    ("read", "path", "named", "nonsense"),
    [
        (read_go, GO / "example.go", named, nonsense)
        for named, nonsense in (
            ("gen/tiltyard/type/v1", "gen/tiltyard/types/v1"),
            ("types.JoinStatement{", "types.JoiningStatement{"),
            ("DisplayName: ", "DisplayedName: "),
            ("Signature: ", "Signed: "),
            ("Role_ROLE_TRAINING_NODE", "Role_ROLE_TRAINER"),
            ("NewTaskServiceClient", "NewTasksServiceClient"),
            (").RegisterParticipant(", ").Register("),
            ("&registry.ListTasksRequest{}", "&registry.GetTaskRequest{}"),
            ("JoinTask(ctx, join)", "JoinTask(ctx, register)"),
            ("range tasks.Tasks", "range tasks.Task"),
            ("each.Config.DisplayName", "each.Config.Title"),
            ("joined.Member.Name", "joined.Membership.Name"),
            ("*errdetails.RetryInfo", "*errdetails.RetriesInfo"),
        )
    ]
    + [
        (read_java, JAVA / "Example.java", named, nonsense)
        for named, nonsense in (
            ("tiltyard.type.v1.Envelope", "tiltyard.types.v1.Envelope"),
            ("v1.JoinStatement;", "v1.JoiningStatement;"),
            ("v1.TaskServiceGrpc;", "v1.TasksServiceGrpc;"),
            (".setPublicKey(", ".setKey("),
            (".setStatement(", ".setEnvelope("),
            (".setRequestId(", ".setRequest("),
            ("Role.ROLE_TRAINING_NODE", "Role.ROLE_TRAINER"),
            (".registerParticipant(", ".register("),
            ("listTasks(ListTasksRequest.", "listTasks(JoinTaskRequest."),
            ("getTasksList()", "getTaskList()"),
            ("each.getState()", "each.getStatus()"),
            ("joined.getMember().getName()", "joined.getMember().getTitle()"),
        )
    ],
)
def test_a_name_that_is_not_there_would_be_found(
    read: Callable[[str], Reading], path: Path, named: str, nonsense: str
) -> None:
    source = path.read_text()
    assert named in source
    assert read(source.replace(named, nonsense)).wrong != []


@pytest.mark.parametrize(("read", "path"), EXAMPLES)
def test_an_example_signs_what_the_registry_asks_for(read: object, path: Path) -> None:
    source = path.read_text()
    ((before, after),) = re.findall(r'"(application/[\w.]+)" \+ kind \+ "([\w.+]+)"', source)
    kinds = re.findall(r'\.(?:sign|envelope)\("(\w+)"', source)
    signed = sign_statement(Key.generate(), envelope_pb2.JoinStatement())
    assert [before + kind + after for kind in kinds] == [signed.payload_type]


@pytest.mark.parametrize(("read", "path"), EXAMPLES)
def test_its_page_names_what_is_there(read: object, path: Path) -> None:
    page, source = (path.parent / "README.md").read_text(), path.read_text()
    pointed = re.findall(r"((?:`\w+`(?: and )?)+) in the example", page)
    assert len(pointed) >= 2
    for name in re.findall(r"`(\w+)`", " ".join(pointed)):
        assert re.search(rf"\b{name}\b", source), name
    for package in re.findall(r"`(tiltyard\.\w+\.v\d+)`", page):
        assert package in PACKAGES
    for proto in re.findall(r"`(\w+\.proto)`", page):
        assert list((ROOT / "protos").rglob(proto)), proto
