"""Serves the protocol of S3 on a free port of 127.0.0.1, from memory, with one empty bucket.

    s3.py BUCKET PORT_FILE

The port is in PORT_FILE as soon as the bucket is there. The packages of s3.txt must be on PYTHONPATH.
"""

import os
import sys
import threading
from urllib.request import Request, urlopen

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

# Names the service; the signature is not looked at.
SIGNED = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


class Handler(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body of an answer are two packets, and the second must not wait for the first to be acknowledged.
    disable_nagle_algorithm = True


bucket, port_file = sys.argv[1:]
application = DomainDispatcherApplication(create_backend_app)
server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Handler)
# A daemon, so that a bucket that cannot be made ends the process.
serving = threading.Thread(target=server.serve_forever, daemon=True)
serving.start()
url = f"http://127.0.0.1:{server.server_port}/{bucket}"
urlopen(Request(url, method="PUT", headers={"Authorization": SIGNED})).read()
with open(port_file + ".new", "w") as file:
    file.write(str(server.server_port))
os.rename(port_file + ".new", port_file)
serving.join()
