"""How a worker waits for a version, from a publisher or from a store.

update = wait_for_version(subscriber, timeout_s=30)
"""

import logging

from weightcast.adapters.vllm import NOT_STAGED
from weightcast.sync import DiskSubscriber, DiskUpdate, Update, WeightSubscriber
from weightcast.sync.errors import DeadlineExceeded, PeerLost

logger = logging.getLogger(__name__)


def wait_for_version(subscriber: WeightSubscriber | DiskSubscriber, timeout_s: float) -> Update | DiskUpdate:
    """The next version. Raises `DeadlineExceeded`; of a store it says that the driver should ask again.

    Nobody tells whoever reads a store to hurry, and a large version takes minutes.
    """
    try:
        return subscriber.wait(timeout_s)
    except PeerLost as error:
        logger.warning("%s; waiting for whoever publishes now", error)
        return subscriber.wait(timeout_s)
    except DeadlineExceeded as error:
        if isinstance(subscriber, DiskSubscriber):
            raise DeadlineExceeded(f"{NOT_STAGED}: {error}") from error
        raise
