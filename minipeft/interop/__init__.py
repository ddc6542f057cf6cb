"""Adapters in the file formats of the field, both ways: docs/interop.md.

    peft.py         Hugging Face PEFT's folders: which tensor lies where, and reading and writing them
    peft_config.py  its adapter_config.json <-> a method
    adapterhub.py   AdapterHub's folders, for bottleneck adapters
    modules.py      what Hugging Face calls the places of a base
    fused.py        adapters of q, k and v <-> one of the map that holds them
    folders.py      options and tensors of an adapter's folder; nothing in it is ignored

Neither library is imported: the tests compare with PEFT itself.
"""

from minipeft.interop.adapterhub import export_adapterhub, import_adapterhub
from minipeft.interop.peft import export_peft, import_peft

__all__ = ["export_adapterhub", "export_peft", "import_adapterhub", "import_peft"]
