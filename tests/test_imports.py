"""Importing any part of the library is silent: no warning, no word with the network."""

import subprocess
import sys

SCRIPT = """
import importlib, pkgutil, sys

def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind"):
        raise RuntimeError(f"{event} while importing: {args}")

sys.addaudithook(refuse)
import jprune

names = [module.name for module in pkgutil.walk_packages(jprune.__path__, "jprune.")]
for name in names:
    importlib.import_module(name)
print(len(names))

import socket
try:
    socket.getaddrinfo("localhost", 80)
except RuntimeError:
    print("guarded")
"""


def test_every_module_imports_without_a_warning_and_without_the_network():
    done = subprocess.run([sys.executable, "-W", "error", "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count, guarded = done.stdout.split()
    assert int(count) > 50
    assert guarded == "guarded"
    assert done.stderr == ""
