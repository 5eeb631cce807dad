//! A device in the store (ABI io 3.8 to 3.11): the directory of the front end, that of the back end, and the node for errors.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use store::StoreError;
use store::local::Transaction;
use toolstack::{Access, DomainId, Node};
use xenbus_backend::{Act, State};

use super::Key;

/// Where a device is in the store.
#[derive(Clone, Debug)]
pub(crate) struct Paths {
    /// The front end's directory.
    pub(crate) front: String,
    /// The back end's directory.
    pub(crate) back: String,
    /// The directory of the back end's errors.
    pub(super) error: String,
}

impl Paths {
    /// The paths of the device with the number `device` and the class `class`, such as `vbd`.
    pub(crate) fn new(own: DomainId, class: &str, domain: u16, device: u32) -> Self {
        let home = format!("/local/domain/{own}");
        Self {
            front: format!("/local/domain/{domain}/device/{class}/{device}"),
            back: format!("{home}/backend/{class}/{domain}/{device}"),
            error: format!("{home}/error/backend/{class}/{domain}/{device}"),
        }
    }

    /// The node that the front end writes, and the back end watches.
    pub(crate) fn front_state(&self) -> String {
        format!("{}/state", self.front)
    }
}

/// Returns both directories as they are first written, with the nodes that all devices have and those of the kind. The guest
/// owns its directory and its state, and reads all other nodes.
pub(crate) fn directories(
    paths: &Paths,
    (own, domain): (DomainId, u16),
    of_front: &[(&str, &str)],
    of_back: &[(&str, &str)],
) -> Vec<Node> {
    let Paths { front, back, .. } = paths;
    let node = |access, path: String, value: &str| Node { path, value: value.to_string(), access };
    let read = |folder: &String, (key, value): &(&str, &str)| node(Access::Read, format!("{folder}/{key}"), value);
    let (backend_id, frontend_id) = (own.to_string(), domain.to_string());
    let mut nodes = Vec::new();
    nodes.push(node(Access::Own, front.clone(), ""));
    let common = [("backend", &**back), ("backend-id", &backend_id), ("trusted", "1")];
    nodes.extend(common.iter().chain(of_front).map(|pair| read(front, pair)));
    nodes.push(node(Access::Own, paths.front_state(), State::Initialising.value()));
    nodes.push(node(Access::Read, back.clone(), ""));
    let common = [("frontend", &**front), ("frontend-id", &frontend_id), ("online", "1")];
    let state = [("state", State::Initialising.value())];
    nodes.extend(common.iter().chain(of_back).chain(&state).map(|pair| read(back, pair)));
    nodes
}

/// Returns the front end's state. `Unknown` if the node is missing.
pub(super) fn front_state(t: &mut Transaction<'_, '_>, paths: &Paths) -> State {
    t.read(&paths.front_state()).map_or(State::Unknown, |value| State::parse(&value))
}

/// Reads the keys that the front end has written.
pub(super) fn front_keys(
    t: &mut Transaction<'_, '_>,
    paths: &Paths,
    keys: impl Iterator<Item = &'static str>,
) -> Vec<(&'static str, Vec<u8>)> {
    let mut read = |key: &'static str| t.read(&format!("{}/{key}", paths.front)).ok().map(|value| (key, value));
    keys.filter_map(&mut read).collect()
}

/// Writes the nodes of an act into the store, in the transaction in which the front end's state was read. `keys` returns the
/// keys that are written together with a state.
pub(super) fn carry_out<N>(
    t: &mut Transaction<'_, '_>,
    paths: &Paths,
    keys: impl Fn(State) -> Vec<Key>,
    act: &Act<N>,
) -> Result<(), StoreError> {
    let state = |t: &mut Transaction<'_, '_>, state: State| {
        for (name, value) in keys(state) {
            t.write(&format!("{}/{name}", paths.back), value.to_string().as_bytes())?;
        }
        t.write(&format!("{}/state", paths.back), state.value().as_bytes())
    };
    match act {
        Act::Publish => {
            absent_is_fine(t.remove(&paths.error))?;
            state(t, State::InitWait)
        }
        Act::Write(now) => state(t, *now),
        Act::Offline => {
            t.write(&format!("{}/online", paths.back), b"0")?;
            state(t, State::Closing)
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

/// Writes why the device does not work. The guest of the device may read it.
pub(super) fn error(t: &mut Transaction<'_, '_>, paths: &Paths, own: DomainId, domain: u16, why: &str) {
    let path = format!("{}/error", paths.error);
    // The error is also in the log, so it is not lost if the node cannot be written.
    let _ = t.write(&path, why.as_bytes()).and_then(|()| t.set_permissions(&path, &format!("n{own},r{domain}")));
}

fn absent_is_fine(removed: Result<(), StoreError>) -> Result<(), StoreError> {
    match removed {
        Err(StoreError::NotFound) => Ok(()),
        other => other,
    }
}
