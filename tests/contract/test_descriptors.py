"""The contract is documentation: every element of the .proto files is commented, and the rules of design hold."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from grpc_tools import protoc
from lora_api.v1 import error_reason_pb2
from lora_client.errors import REASONS
from lora_server import errors
from lora_server.rpc.handlers import Handlers
from lora_server.rpc.status import CODES

PROTOS = Path(__file__).parents[2] / "protos"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[descriptor_pb2.FileDescriptorProto]:
    """The descriptors of all our files, with their comments."""
    out = tmp_path_factory.mktemp("descriptors") / "set.pb"
    names = [str(path) for path in sorted(PROTOS.glob("lora_api/v1/*.proto"))]
    google = resources.files("grpc_tools") / "_proto"
    assert (
        protoc.main(
            ["protoc", f"-I{PROTOS}", f"-I{google}", "--include_source_info", f"--descriptor_set_out={out}", *names]
        )
        == 0
    )
    return list(descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file)


def elements(file: descriptor_pb2.FileDescriptorProto) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every element of a file that must be commented, with its path in the source information."""
    for m, message in enumerate(file.message_type):
        yield message.name, (4, m)
        for f, field in enumerate(message.field):
            yield f"{message.name}.{field.name}", (4, m, 2, f)
        for o, oneof in enumerate(message.oneof_decl):
            if not oneof.name.startswith("_"):
                yield f"{message.name}.{oneof.name}", (4, m, 8, o)
    for e, enum in enumerate(file.enum_type):
        yield enum.name, (5, e)
        for v, value in enumerate(enum.value):
            yield f"{enum.name}.{value.name}", (5, e, 2, v)
    for s, service in enumerate(file.service):
        yield service.name, (6, s)
        for r, method in enumerate(service.method):
            yield f"{service.name}.{method.name}", (6, s, 2, r)


def test_every_element_is_commented(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
    """No message, field, oneof, enum, value, service or RPC without a comment before it."""
    for file in files:
        comments = {tuple(at.path): at.leading_comments.strip() for at in file.source_code_info.location}
        bare = [name for name, path in elements(file) if not comments.get(path)]
        assert not bare, file.name


def test_every_enum_has_an_unspecified_zero(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
    """Enum zero is never a real value."""
    for file in files:
        for enum in file.enum_type:
            zero = next(value for value in enum.value if value.number == 0)
            assert zero.name.endswith("_UNSPECIFIED"), enum.name


def test_rpc_names_are_unique_across_services(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
    """An RPC's name alone says which it is, and each has a handler."""
    names = [method.name for file in files for service in file.service for method in service.method]
    assert len(names) == len(set(names))
    for name in names:
        snake = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)[1:]
        assert hasattr(Handlers, snake), name


def test_imports_stay_at_home(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
    """Only google/protobuf and one another, so that a bare protoc anywhere compiles them."""
    for file in files:
        assert all(name.startswith(("google/protobuf/", "lora_api/v1/")) for name in file.dependency), file.name
        assert file.options.go_package


def test_no_reason_is_unmapped() -> None:
    """Every reason has a code, a server class and a client class, and nothing else has one."""
    reasons = set(error_reason_pb2.ErrorReason.keys()) - {"ERROR_REASON_UNSPECIFIED"}
    raised = {
        value.reason
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.LoraServerError) and hasattr(value, "reason")
    }
    assert reasons == raised == set(CODES) == set(REASONS)


def test_every_reason_has_an_example(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
    """Each reason's comment shows its ErrorInfo, and names the code of the server's table."""
    file = next(file for file in files if file.name.endswith("error_reason.proto"))
    comments = {tuple(at.path): at.leading_comments for at in file.source_code_info.location}
    for v, value in enumerate(file.enum_type[0].value):
        if value.number:
            comment = comments[(5, 0, 2, v)]
            assert f'"reason": "{value.name}"' in comment
            assert CODES[value.name].name in comment
