"""A process that uses the real client, for the tests of the Hub: importing takes long, so that one serves many checks.

    with Client(hub.environment(token, folder), log) as client:
        client("model = PPlugModel.from_pretrained(name)", name="me/plug")
        assert client("result = model.config.num_persona_tokens") == 1

It cannot connect to anything but the loopback, and does not wait between retries.
"""

import json
import subprocess
import sys

_PROCESS = """
import json, os, sys, time
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print goes into the log
from hub_server import loopback_only
loopback_only()
waits = []
time.sleep = waits.append
scope = {"waits": waits}
exec("import tiny, torch; from pathlib import Path; from pplug_hf import *; from pplug_hf.errors import *", scope)
for line in sys.stdin:
    code, given = json.loads(line)
    scope.pop("result", None)
    try:
        scope.update(given)
        exec(code, scope)
        answer = {"result": scope.get("result")}
    except Exception as error:
        import traceback
        traceback.print_exc()
        answer = {"kinds": [kind.__name__ for kind in type(error).__mro__], "message": str(error)}
    answers.write(json.dumps(answer) + "\\n")
    answers.flush()
"""


class Refused(Exception):
    """What the code in the process raised: its message, and the names of its classes."""

    def __init__(self, message, kinds):
        super().__init__(message)
        self.kinds = kinds


class Client:
    def __init__(self, environment, log):
        self.log = log
        command = [sys.executable, "-c", _PROCESS]
        with log.open("a") as file:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True
            )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.communicate()

    def __call__(self, code, **given):
        """Run code there, with names for values. Returns what it calls `result`."""
        self.start(code, **given)
        line = self.process.stdout.readline()
        assert line, self.log.read_text()[-3000:]
        answer = json.loads(line)
        if "kinds" in answer:
            raise Refused(answer["message"], answer["kinds"])
        return answer["result"]

    def start(self, code, **given):
        """The same without waiting for it."""
        self.process.stdin.write(json.dumps([code, given]) + "\n")
        self.process.stdin.flush()
