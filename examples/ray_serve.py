"""An example: RAY_AUTH_MODE=token python examples/ray_serve.py engines/demo/dense-fp32-cpu.

Two replicas of a server at http://127.0.0.1:8000, behind the key in VISISTAGE_API_KEY. Ray's own
ports run any code that they are sent: here they are open to this machine alone (docs/serving.md
says which is not), and by RAY_AUTH_MODE=token (`ray get-auth-token --generate` makes one) only to
who has its token. There is no dashboard.
"""

import os
import sys

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on import: its ports are at 127.0.0.1

import ray
from ray import serve
from visistage.serve.ray import deployment

ray.init(include_dashboard=False)
serve.start(http_options={"host": "127.0.0.1", "port": 8000})
key = os.environ["VISISTAGE_API_KEY"]
serve.run(deployment({"demo": sys.argv[1]}, replicas=2, threads=1, api_key=key), blocking=True)
