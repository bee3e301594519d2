import hashlib
import json
from pathlib import Path

import pytest
import torch
import transformers

from gemscope.core.device import choose_device, choose_dtype
from gemscope.core.errors import InputError
from gemscope.core.provenance import collect


def test_provenance_tells_versions_seeds_inputs_and_machine(tmp_path: Path):
    (tmp_path / "in.txt").write_text("text")
    made = collect(seeds={"train": 3}, inputs={"corpus": tmp_path / "in.txt"}, model="microworld-it")
    told = json.loads(json.dumps(made.as_dict()))
    assert told["versions"]["torch"] == torch.__version__
    assert told["versions"]["transformers"] == transformers.__version__
    assert told["seeds"] == {"train": 3}
    assert told["inputs"] == {"corpus": hashlib.sha256(b"text").hexdigest()}
    assert told["notes"] == {"model": "microworld-it"}
    assert told["git"] is None or len(told["git"].removesuffix("+dirty")) == 40
    assert not any(str(Path.home()) in str(value) for value in told.values())


def test_devices_and_dtypes_are_chosen_or_refused():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device().type in ("cpu", "cuda", "mps")
    assert choose_dtype("bf16") is torch.bfloat16
    assert choose_dtype(None, torch.device("cpu")) is torch.float32
    assert choose_dtype(None, torch.device("cuda")) is torch.bfloat16
    assert choose_dtype(torch.float64) is torch.float64
    with pytest.raises(InputError, match="int3"):
        choose_dtype("int3")
    with pytest.raises(InputError, match="toaster"):
        choose_device("toaster")
