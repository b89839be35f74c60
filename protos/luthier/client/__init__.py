"""A light client for the Luthier coordinator.

```python
from luthier.client import Client
from luthier.v1.job_pb2 import Job
from luthier.v1.training_pb2 import FinetuneSpec

with Client("127.0.0.1:7420", token="lut_...") as client:
    job = client.create_job(Job(finetune=FinetuneSpec(base="builtin:tiny", dataset="tickets", method="full")))
    for item in client.watch(job.name):
        print(item)
```
"""

from luthier.client.client import Client
from luthier.client.errors import (
    Aborted,
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    LuthierError,
    NotFound,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    Violation,
)
from luthier.client.names import short_name
from luthier.client.streams import is_terminal

__all__ = [
    "Aborted",
    "AlreadyExists",
    "Cancelled",
    "Client",
    "DeadlineExceeded",
    "FailedPrecondition",
    "Internal",
    "InvalidArgument",
    "LuthierError",
    "NotFound",
    "OutOfRange",
    "PermissionDenied",
    "ResourceExhausted",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Violation",
    "is_terminal",
    "short_name",
]
