//! What the integration tests share: brokers, producers, proxies.
