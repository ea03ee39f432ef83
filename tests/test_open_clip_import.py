"""open_clip is imported fast, and works as without unclip."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from unclip.open_clip_import import import_open_clip


def in_a_new_process(script: str, *args: str) -> str:
    command = [sys.executable, "-c", script, *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_what_open_clip_did_not_import_works_afterwards():
    script = (
        "import sys, torch, unclip.clip\n"
        "assert not {'torch._dynamo', 'timm', 'transformers'} & set(sys.modules)\n"
        "supported = sys.modules['torchvision.ops.roi_align'].is_compile_supported('cpu')\n"
        "double = torch.compile(lambda x: 2 * x, backend='eager')\n"
        "print(supported, torch._dynamo.is_compiling(), double(torch.ones(1)).item())"
    )
    assert in_a_new_process(script) == "True False 2.0\n"


def test_open_clip_works_as_without_unclip(tmp_path):
    """Also its towers of timm and transformers, whose imports take too long for those without."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    transformers.BertConfig(**sizes, intermediate_size=32).save_pretrained(tmp_path)
    script = (
        "import sys, unclip.clip, open_clip, torch\n"
        "from open_clip.timm_model import TimmModel\n"
        "from open_clip.hf_model import HFTextEncoder\n"
        "assert not {'timm', 'transformers'} & set(sys.modules)\n"
        "vision = {'timm_model_name': 'test_vit', 'image_size': 160}\n"
        "text = {'hf_model_name': sys.argv[1], 'hf_model_pretrained': False}\n"
        "text |= {'hf_proj_type': 'linear', 'hf_pooler_type': 'cls_pooler'}\n"
        "model = open_clip.CustomTextCLIP(8, vision, text)\n"
        "assert isinstance(model.visual, TimmModel) and isinstance(model.text, HFTextEncoder)\n"
        "model.text.output_tokens = True\n"
        "print(*(tuple(x.shape) for x in model.text(torch.ones(2, 5, dtype=torch.long))))\n"
    )
    # without the first token, which is pooled
    assert in_a_new_process(script, str(tmp_path)) == "(2, 8) (2, 4, 24)\n"


def test_the_modules_of_open_clip_are_those_that_it_has_without_unclip():
    script = (
        "import sys, unclip.clip, open_clip\n"
        "pooler = open_clip.hf_model.ClsPooler()\n"  # made or read: both import what it needs
        "print(open_clip.timm_model.timm.__name__, open_clip.coca_model._has_transformers)\n"
        "def modules(): return {n: m for n, m in sys.modules.items() if 'open_clip' in n}\n"
        "def own(name): return name.split('.')[0] not in ('timm', 'transformers')\n"
        "ours = modules()\n"
        "for name in ours: del sys.modules[name]\n"
        "import open_clip\n"  # with timm and transformers
        "for name, module in modules().items():\n"
        "    mine, theirs = vars(ours[name]), vars(module)\n"
        "    assert mine.keys() == theirs.keys(), name\n"
        "    for key, value in theirs.items():\n"
        "        owner = getattr(value, '__module__', None) or key\n"
        "        assert own(owner) or mine[key] is value, (name, key)\n"
        "del sys.modules['unclip.clip']\n"
        "import unclip.clip\n"  # leaves a complete open_clip as it is
        "assert type(open_clip.timm_model) is type(sys)\n"
    )
    assert in_a_new_process(script).startswith("timm ")


def test_functions_that_timm_excludes_from_compilation_are_not_compiled():
    script = (
        "import sys, torch, unclip.clip, open_clip\n"
        "exclude = open_clip.timm_model.timm.layers.disable_compiler\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "sine, operators = exclude(lambda x: x.sin()), []\n"
        "def backend(graph, inputs):\n"
        "    operators.extend(n.target for n in graph.graph.nodes if n.op == 'call_method')\n"
        "    return graph\n"
        "torch.compile(lambda x: sine(x.exp()).cos(), backend=backend)(torch.ones(1))\n"
        "print(operators)"
    )
    assert in_a_new_process(script) == "['exp', 'cos']\n"


def test_a_torchvision_that_needs_more_of_torch_is_imported():
    script = (
        "import sys, unclip.weights\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torchvision.ops':\n"
        "            from torch._dynamo.utils import counters\n"
        "sys.meta_path.insert(0, Finder())\n"
        "import unclip.clip\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_torchvision_that_does_not_fit_torch_is_one_error(monkeypatch):
    class Finder:
        @staticmethod
        def find_spec(name, *_):
            if name == "torchvision":
                raise RuntimeError("operator torchvision::x does not exist")

    monkeypatch.delitem(sys.modules, "torchvision")
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    with pytest.raises(
        ImportError, match=rf"torch {re.escape(torch.__version__)} \(operator .*; install"
    ):
        import_open_clip()
