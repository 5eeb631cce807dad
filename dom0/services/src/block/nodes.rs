//! A disk in the store (ABI io 3.8 to 3.10): the directory of the front end, that of the back end, and the node for errors.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use block_backend::{BadFront, Features, Front, KEYS, Key, MAX_RING_KEYS};
use store::StoreError;
use store::local::Transaction;
use toolstack::disk::DiskConfig;
use toolstack::{Access, DomainId, Node};
use xenbus_backend::{Act, State};

/// Where a disk is in the store.
#[derive(Clone, Debug)]
pub(super) struct Paths {
    /// The front end's directory.
    pub(super) front: String,
    /// The back end's directory.
    pub(super) back: String,
    /// The directory of the back end's errors.
    pub(super) error: String,
}

impl Paths {
    pub(super) fn new(own: DomainId, domain: u16, device: u32) -> Self {
        let home = format!("/local/domain/{own}");
        Self {
            front: format!("/local/domain/{domain}/device/vbd/{device}"),
            back: format!("{home}/backend/vbd/{domain}/{device}"),
            error: format!("{home}/error/backend/vbd/{domain}/{device}"),
        }
    }

    /// The node that the front end writes, and the back end watches.
    pub(super) fn front_state(&self) -> String {
        format!("{}/state", self.front)
    }
}

/// Returns both directories as they are first written. The guest owns its directory and its state, and reads all other nodes.
pub(super) fn directories(
    paths: &Paths,
    own: DomainId,
    domain: u16,
    config: &DiskConfig,
    features: &Features,
    discard: bool,
) -> Vec<Node> {
    let Paths { front, back, .. } = paths;
    let node = |access, path: String, value: &str| Node { path, value: value.to_string(), access };
    let device = config.vdev.number().to_string();
    let (backend_id, frontend_id) = (own.to_string(), domain.to_string());
    let (target, discard) = (config.target.to_string(), if discard { "1" } else { "0" });
    let mut nodes = Vec::new();
    nodes.push(node(Access::Own, front.clone(), ""));
    let of_front = [
        ("backend", &**back),
        ("backend-id", &backend_id),
        ("virtual-device", &device),
        ("device-type", "disk"),
        ("trusted", "1"),
    ];
    nodes.extend(of_front.map(|(key, value)| node(Access::Read, format!("{front}/{key}"), value)));
    nodes.push(node(Access::Own, paths.front_state(), State::Initialising.value()));
    nodes.push(node(Access::Read, back.clone(), ""));
    let of_back = [
        ("frontend", &**front),
        ("frontend-id", &frontend_id),
        ("online", "1"),
        ("removable", "0"),
        ("bootable", "1"),
        ("dev", config.vdev.name()),
        ("type", "phy"),
        ("mode", features.mode()),
        ("device-type", "disk"),
        ("discard-enable", discard),
        ("params", &target),
        ("state", State::Initialising.value()),
    ];
    nodes.extend(of_back.map(|(key, value)| node(Access::Read, format!("{back}/{key}"), value)));
    nodes
}

/// Returns the front end's state. `Unknown` if the node is missing.
pub(super) fn front_state(t: &mut Transaction<'_, '_>, paths: &Paths) -> State {
    t.read(&paths.front_state()).map_or(State::Unknown, |value| State::parse(&value))
}

/// Reads what the front end has published.
pub(super) fn front(t: &mut Transaction<'_, '_>, paths: &Paths) -> Result<Front, BadFront> {
    let mut found: Vec<(&str, Vec<u8>)> = Vec::new();
    for key in KEYS.into_iter().chain(MAX_RING_KEYS) {
        let value = t.read(&format!("{}/{key}", paths.front));
        found.extend(value.ok().map(|value| (key, value)));
    }
    Front::parse(|key| found.iter().find(|(name, _)| *name == key).map(|(_, value)| &**value))
}

/// Writes the nodes of an act into the store, in the transaction in which the front end's state was read.
pub(super) fn carry_out<N>(
    t: &mut Transaction<'_, '_>,
    paths: &Paths,
    features: &Features,
    act: &Act<N>,
) -> Result<(), StoreError> {
    match act {
        Act::Publish => {
            absent_is_fine(t.remove(&paths.error))?;
            keys(t, &paths.back, features.offered())?;
            state(t, paths, State::InitWait)
        }
        Act::Write(State::Connected) => {
            keys(t, &paths.back, features.connected())?;
            state(t, paths, State::Connected)
        }
        Act::Write(now) => state(t, paths, *now),
        Act::Offline => {
            t.write(&format!("{}/online", paths.back), b"0")?;
            state(t, paths, State::Closing)
        }
        Act::Remove => {
            for path in [&paths.front, &paths.back, &paths.error] {
                absent_is_fine(t.remove(path))?;
            }
            Ok(())
        }
        Act::Rest | Act::Read | Act::Connect(_) | Act::Disconnect | Act::InUse => Ok(()),
    }
}

/// Writes why the disk does not work. The guest of the disk may read it.
pub(super) fn error(t: &mut Transaction<'_, '_>, paths: &Paths, own: DomainId, domain: u16, why: &str) {
    let path = format!("{}/error", paths.error);
    // The error is also in the log, so it is not lost if the node cannot be written.
    let _ = t.write(&path, why.as_bytes()).and_then(|()| t.set_permissions(&path, &format!("n{own},r{domain}")));
}

fn state(t: &mut Transaction<'_, '_>, paths: &Paths, state: State) -> Result<(), StoreError> {
    t.write(&format!("{}/state", paths.back), state.value().as_bytes())
}

fn keys(t: &mut Transaction<'_, '_>, back: &str, keys: impl Iterator<Item = Key>) -> Result<(), StoreError> {
    for Key { name, value } in keys {
        t.write(&format!("{back}/{name}"), value.to_string().as_bytes())?;
    }
    Ok(())
}

fn absent_is_fine(removed: Result<(), StoreError>) -> Result<(), StoreError> {
    match removed {
        Err(StoreError::NotFound) => Ok(()),
        other => other,
    }
}
