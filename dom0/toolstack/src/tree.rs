//! The part of the store's tree that tells a guest who it is.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use guest_image::MachineFrame;

use crate::create::Guest;
use crate::privileged::DomainId;

/// Who may do what with a node of the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Ours; the guest reads (`n0,rN`).
    Read,
    /// The guest's own (`nN`).
    Own,
}

/// A node to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Absolute path.
    pub path: String,
    /// Its value.
    pub value: String,
    /// What the guest may do.
    pub access: Access,
}

/// The store, with the rights of its owner.
#[allow(clippy::missing_errors_doc, reason = "each may fail for the store's own reasons")]
pub trait Store {
    /// Why the store refused.
    type Error: fmt::Display;

    /// Writes all nodes or none, in one transaction. `guest` is the domain the nodes' access is about.
    fn write(&self, guest: DomainId, nodes: &[Node]) -> Result<(), Self::Error>;

    /// Removes a node and all below it, perhaps in pieces; one that does not exist is no error.
    fn remove(&self, path: &str) -> Result<(), Self::Error>;

    /// Begins to serve the domain: its store page, which it granted as reference 1, and its port.
    fn introduce(&self, domain: DomainId, page: MachineFrame, port: u32) -> Result<(), Self::Error>;

    /// Serves the domain no longer, and drops what it had in watches and transactions.
    fn release(&self, domain: DomainId) -> Result<(), Self::Error>;

    /// Tells those who watch for it that a domain shut down.
    fn domain_shut_down(&self, domain: DomainId);

    /// Whether nothing is left to do about domains that are gone.
    fn is_settled(&self) -> bool;

    /// Sets aside memory for what the next guest may make the store hold; answers whether there is enough. What earlier
    /// guests left must be gone: see [`Store::is_settled`].
    fn reserve(&self) -> bool;

    /// No guest comes: frees what was set aside for it.
    fn give_back(&self);
}

/// The domain's own directory.
pub(crate) fn home(domain: DomainId) -> String {
    format!("/local/domain/{domain}")
}

/// The directory named by UUID, which outlives the domain's number.
pub(crate) fn vm(uuid: &[u8; 16]) -> String {
    let mut text = String::from("/vm/");
    for (i, byte) in uuid.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

/// The back end's directory of the console that every guest has.
pub(crate) fn console_back(domain: DomainId, backend: DomainId) -> String {
    format!("/local/domain/{backend}/backend/console/{domain}")
}

/// Everything a guest finds when it starts, but for its devices. A stock kernel hangs without the store, ends
/// its scan for devices at the first directory it may not list, and complains about each missing vcpu.
pub(crate) fn nodes(guest: &Guest, backend: DomainId) -> Vec<Node> {
    let (domain, config) = (guest.domain, &guest.config);
    let (home, vm) = (home(domain), vm(&guest.uuid));
    let uuid = vm.trim_start_matches("/vm/").to_string();
    let back = console_back(domain, backend);
    let [kib, most] = [config.memory, config.maxmem].map(|mib| (mib << 10).to_string());
    let mut nodes = Vec::new();
    let mut put = |access, path: String, value: &str| nodes.push(Node { path, value: value.to_string(), access });
    let mut read = |path: &str, value: &str| put(Access::Read, format!("{home}{path}"), value);
    read("", "");
    read("/vm", &vm);
    read("/name", &config.name);
    read("/domid", &domain.to_string());
    for directory in ["/device", "/control", "/memory", "/cpu", "/platform"] {
        read(directory, "");
    }
    read("/control/platform-feature-multiprocessor-suspend", "1");
    read("/memory/static-max", &most);
    read("/memory/target", &kib);
    for vcpu in 0..config.vcpus {
        read(&format!("/cpu/{vcpu}/availability"), "online");
    }
    read("/store/port", &guest.store.port.to_string());
    read("/store/ring-ref", &guest.store.page.0.to_string());
    let console = [
        ("backend", format!("{back}/0")),
        ("backend-id", backend.to_string()),
        ("limit", "1048576".into()),
        ("type", "xenconsoled".into()),
        ("output", "pty".into()),
        ("tty", String::new()),
        ("port", guest.console.port.to_string()),
        ("ring-ref", guest.console.page.0.to_string()),
    ];
    for (key, value) in console {
        read(&format!("/console/{key}"), &value);
    }
    let owned = [
        "control/shutdown",
        "control/sysrq",
        "control/feature-poweroff",
        "control/feature-reboot",
        "control/feature-suspend",
        "data",
        "drivers",
        "feature",
        "attr",
        "error",
        "device/suspend/event-channel",
    ];
    for path in owned {
        put(Access::Own, format!("{home}/{path}"), "");
    }
    // For tools. This console takes part in no handshake, so its state stays as Xen's tools write it (ABI io 2.2).
    let console = [
        ("", ""),
        ("/frontend", &format!("{home}/console")),
        ("/frontend-id", &domain.to_string()),
        ("/online", "1"),
        ("/state", "1"),
        ("/protocol", "vt100"),
    ];
    for (key, value) in console {
        put(Access::Read, format!("{back}/0{key}"), value);
    }
    put(Access::Read, vm.clone(), "");
    put(Access::Read, format!("{vm}/name"), &config.name);
    put(Access::Read, format!("{vm}/uuid"), &uuid);
    nodes
}
