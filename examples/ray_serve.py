"""An example: RAY_AUTH_MODE=token python examples/ray_serve.py engines/demo/dense-fp32-cpu.

Two replicas of a server at http://127.0.0.1:8000, behind the key in VISISTAGE_API_KEY. Ray's own
ports run any code that they are sent: it listens on this machine alone, without a dashboard, and
by RAY_AUTH_MODE=token (`ray get-auth-token --generate` makes one) only to who has its token.
"""

import os
import sys

import ray
from ray import serve
from visistage.serve.ray import deployment

ray.init(include_dashboard=False, _node_ip_address="127.0.0.1")
serve.start(http_options={"host": "127.0.0.1", "port": 8000})
key = os.environ["VISISTAGE_API_KEY"]
serve.run(deployment({"demo": sys.argv[1]}, replicas=2, threads=1, api_key=key), blocking=True)
