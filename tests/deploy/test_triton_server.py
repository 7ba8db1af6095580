"""The model repository for NVIDIA's Triton Inference Server, against the schema that NVIDIA publishes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from onnx_needed import skip_without_onnx

from fastgrad.commands.cli import main
from fastgrad.deploy.file.package import ModelPackage, PackageError
from fastgrad.deploy.triton_server import write_repository

skip_without_onnx()


@pytest.fixture(scope="module")
def schema() -> ModuleType:
    """``model_config.proto`` as the package tritonclient compiles it; its own imports, of gRPC, are not needed."""
    pytest.importorskip("google.protobuf")
    try:
        files = importlib.metadata.files("tritonclient") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("tritonclient is not installed")
    path = next(
        file.locate() for file in files if str(file).endswith("tritonclient/grpc/model_config_pb2.py")
    )
    spec = importlib.util.spec_from_file_location("model_config_pb2", str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it was compiled for a newer protobuf than the one that onnx brought
        pytest.skip(f"tritonclient's schema does not load: {error}")
    return module


def test_the_configuration_follows_the_published_schema(
    tiny_onnx: Path, tmp_path: Path, schema: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    from google.protobuf import text_format

    assert main(["triton", str(tiny_onnx), str(tmp_path), "--name", "tiny", "--batch-wait-ms", "1.5"]) == 0
    assert f"tritonserver --model-repository={tmp_path}" in capsys.readouterr().out
    folder = tmp_path / "tiny"
    config = text_format.Parse((folder / "config.pbtxt").read_text("utf-8"), schema.ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "onnxruntime", 32)
    assert config.dynamic_batching.max_queue_delay_microseconds == 1500
    (given,) = config.input
    assert (given.name, given.data_type, list(given.dims)) == ("input", schema.TYPE_FP32, [3, 8, 8])
    outputs = {value.name: value for value in config.output}
    assert list(outputs) == ["logits", "probabilities", "uncertainty"]
    assert list(outputs["logits"].dims) == [4]
    assert outputs["probabilities"].label_filename == "labels.txt"
    assert (folder / "labels.txt").read_text("utf-8").splitlines() == ["cat", "dog", "cow", "hen"]
    # One number a sample: the server wants a shape and takes it away again.
    assert list(outputs["uncertainty"].dims) == [1]
    assert outputs["uncertainty"].HasField("reshape")
    assert not outputs["uncertainty"].reshape.shape
    assert json.loads(config.parameters["fastgrad"].string_value)["labels"] == ["cat", "dog", "cow", "hen"]


def test_the_model_is_the_file(tiny_onnx: Path, tmp_path: Path) -> None:
    folder = write_repository(tiny_onnx, tmp_path / "models", version=3, max_batch=500)
    assert "max_batch_size: 64\n" in (folder / "config.pbtxt").read_text()
    assert folder.name == tiny_onnx.stem
    x = torch.randn(2, 3, 8, 8)
    ours, theirs = ModelPackage(folder / "3" / "model.onnx")(x), ModelPackage(tiny_onnx)(x)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_bad_arguments(tiny_onnx: Path, tmp_path: Path) -> None:
    for change, message in (
        ({"model": "model.pt2"}, r"model must end in \.onnx; it was 'model\.pt2'"),
        ({"repository": tmp_path / "none" / "models"}, "repository must be a folder, or a new one in"),
        ({"repository": tiny_onnx}, "repository must be a folder, or a new one in"),
        ({"name": "../up"}, r"name must be letters.*it was '\.\./up'"),
        ({"version": 0}, "version must be a positive int; it was 0"),
        ({"max_batch": True}, "max_batch must be a positive int; it was True"),
        ({"max_delay": -1.0}, "max_delay must be seconds"),
    ):
        with pytest.raises(ValueError, match=message):
            write_repository(**{"model": tiny_onnx, "repository": tmp_path, **change})
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(PackageError, match="not a readable"):
        write_repository(tmp_path / "text.onnx", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["text.onnx"]
