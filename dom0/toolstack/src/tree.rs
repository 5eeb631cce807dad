//! The part of the store's tree that tells a guest about itself.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use guest_image::MachineFrame;

use crate::create::Guest;
use crate::privileged::DomainId;

/// The permissions of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Owned by dom0; the guest may read (`n0,rN`).
    Read,
    /// Owned by the guest (`nN`).
    Own,
}

/// A node to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Absolute path.
    pub path: String,
    /// Its value.
    pub value: String,
    /// The guest's access to it.
    pub access: Access,
}

/// The store, with all rights of its owner.
#[allow(clippy::missing_errors_doc, reason = "each may fail for the store's own reasons")]
pub trait Store {
    /// Why the store refused.
    type Error: fmt::Display;

    /// Writes all nodes or none, in one transaction. `guest` is the domain that gets the nodes' [`Access`].
    fn write(&self, guest: DomainId, nodes: &[Node]) -> Result<(), Self::Error>;

    /// Removes a node and all below it, perhaps in pieces. A node that does not exist is no error.
    fn remove(&self, path: &str) -> Result<(), Self::Error>;

    /// Begins to serve the domain, by its store page (which the domain granted with reference 1) and its port.
    fn introduce(&self, domain: DomainId, page: MachineFrame, port: u32) -> Result<(), Self::Error>;

    /// Stops serving the domain, and drops its watches and transactions.
    fn release(&self, domain: DomainId) -> Result<(), Self::Error>;

    /// Tells the watchers of `@releaseDomain` that a domain shut down.
    fn domain_shut_down(&self, domain: DomainId);

    /// Whether everything of domains that are gone has been removed.
    fn is_settled(&self) -> bool;

    /// Sets aside memory for what the next guest can make the store hold; returns whether there is enough. The remains
    /// of earlier guests must be removed before: see [`Store::is_settled`].
    fn reserve(&self) -> bool;

    /// Frees what [`Store::reserve`] set aside, because the guest was not made.
    fn give_back(&self);
}

/// The home directory of a domain.
pub(crate) fn home(domain: DomainId) -> String {
    format!("/local/domain/{domain}")
}

/// The directory named by the guest's UUID, which is not used again, unlike the domain's number.
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

/// The back end's directory for the console of a guest.
pub(crate) fn console_back(domain: DomainId, backend: DomainId) -> String {
    format!("/local/domain/{backend}/backend/console/{domain}")
}

/// All nodes that a guest needs when it starts, except those of its devices. Without the store, a stock kernel hangs;
/// it ends its scan for devices at the first directory that it may not list, and complains about each missing vcpu.
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
    // For tools. This console has no handshake, so its state stays as Xen's tools write it (ABI io 2.2).
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
