//! How two domains talk through a shared page: index arithmetic and checks for both ends.
//!
//! Touches: shared memory, and that only through the [`SharedPage`] trait, one copy at a time.
//! Never touches: event channels (every function that moves an index says whether to notify, the
//! caller notifies), grants, the heap, the meaning of what is carried.
//! Deliberately absent: any Rust reference into a shared page. What the peer may change while we
//! look at it is copied once, and only the copy is judged.
//!
//! | module | what travels | ABI section |
//! | --- | --- | --- |
//! | [`bytes`] | a stream of bytes one way, the part common to the next two | 2.1, 3.1 |
//! | [`console`] | the console page: 1024 bytes in, 2048 bytes out | 2 |
//! | [`store`] | the store page: 1024 bytes each way, features, errors | 3.1 |
//! | [`ring`] | requests and responses in the same slots, with event indices | 4 |
//! | [`block`] | what stands in the slots of a disk's ring, and the journal of its back end | 5, 9.3 |
//! | [`net`] | what stands in the slots of a network device's rings, and which slots are a packet | 6 |
//!
//! The peer is taken for hostile. Each end keeps its own index privately and only publishes it;
//! every index read from the page passes one check before anything is copied; a refusal is a value
//! (`BadIndices`, `RingError`) after which the caller stops serving that ring. Nothing here panics
//! or loops on what the peer wrote.
#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

pub mod block;
pub mod bytes;
pub mod console;
pub mod net;
pub mod page;
pub mod ring;
pub mod store;

pub use bytes::BadIndices;
pub use page::{SharedPage, WordPage};
