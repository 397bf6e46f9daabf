"""Lets Python processes believe that their CPU multiplies bf16 fast; conftest.py puts this folder on their path."""

import importlib.util
import sys


class _Claiming:
    """Finds torch.cpu, and changes its answer when it has been loaded: importing torch here would take seconds."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch.cpu":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (load(module), claim(module))
        return spec


def claim(cpu):
    """Makes torch.cpu say so."""
    able = cpu.get_capabilities()
    cpu.get_capabilities = lambda: {**able, "avx512_bf16": True}


sys.meta_path.insert(0, _Claiming())
