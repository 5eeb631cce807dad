//! The manager's replies to commands, and how they are shown: as text for a person, as JSON for a program.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use hypercall_abi::domctl::DomainInfo;

use super::LastEnd;
use crate::end::EndRequest;
use crate::json::{self, Object};
use crate::{DomainId, Summary, states};

/// The reply to a command that was carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The command was carried out, and there is nothing else to show.
    Done {
        /// The verb of the command.
        verb: &'static str,
        /// The guest.
        name: String,
    },
    /// A guest was made.
    Created {
        /// The guest.
        name: String,
        /// Its domain.
        domain: DomainId,
    },
    /// A guest was asked to power off or reboot, and need not obey: see [`super::Manager::wait`].
    Asked {
        /// The verb of the command.
        verb: &'static str,
        /// For waiting until the guest has obeyed.
        wait: Wait,
    },
    /// The number of a guest's domain.
    Domid {
        /// The guest.
        name: String,
        /// Its domain.
        domain: DomainId,
    },
    /// How long a guest, or dom0, has run.
    Uptime {
        /// The guest; `dom0` for the machine.
        name: String,
        /// Whole seconds.
        seconds: u64,
    },
    /// The machine's version, memory and CPUs.
    Info(MachineInfo),
    /// The guests and domains.
    List(Vec<Row>),
    /// The machine's disks.
    Disks(Vec<DiskRow>),
    /// The disks of guests.
    GuestDisks(Vec<GuestDisk>),
    /// The networks.
    Networks(Vec<NetworkRow>),
    /// The network devices of guests.
    GuestVifs(Vec<GuestVif>),
    /// The hypervisor's log: lines of printable ASCII.
    Log(Vec<String>),
    /// The help text.
    Help(String),
    /// The face that gave the command (the prompt or `--exec`) is to show this guest's console.
    Console(String),
    /// The machine is to be turned off.
    Quit,
}

/// What `info` shows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MachineInfo {
    /// The hypervisor's version by its ABI: `4.17.0-tenon`.
    pub abi: String,
    /// Memory in MiB.
    pub total_mib: u64,
    /// Free memory in MiB.
    pub free_mib: u64,
    /// Memory in KiB that is neither free nor any domain's.
    pub hypervisor_kib: u64,
    /// Memory of dom0 in KiB, without the boot bundle.
    pub dom0_kib: u64,
    /// The part of `dom0_kib` that is set aside for all guests, in KiB.
    pub for_guests_kib: usize,
    /// What is set aside in dom0 for each guest when it is made, in KiB.
    pub each_guest_kib: usize,
    /// What is set aside in dom0 for each disk of a guest while it is attached, in KiB.
    pub each_disk_kib: usize,
    /// What is set aside in dom0 for each network device of a guest while it is attached, in KiB.
    pub each_vif_kib: usize,
    /// The boot bundle in KiB.
    pub bundle_kib: u64,
    /// Number of CPUs.
    pub cpus: u32,
    /// Number of domains, including dom0.
    pub domains: usize,
    /// Number of online vcpus of all domains.
    pub vcpus: u32,
}

/// A line of `list`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Row {
    /// An existing domain.
    Domain {
        /// The name of the guest; `dom0`, or `-` for a domain that the manager does not know.
        name: String,
        /// What the hypervisor reports of it.
        info: DomainInfo,
    },
    /// A guest that is still to be made.
    Planned(Size),
    /// A guest that has ended and has no domain, and how it ended.
    Ended(Size, Option<LastEnd>),
}

/// A line of `disks`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskRow {
    /// The serial number in printable ASCII, if the disk has one.
    pub serial: Option<String>,
    /// Its size.
    pub bytes: u64,
    /// Bytes of a logical block.
    pub block_bytes: u32,
    /// Whether nobody can write it.
    pub read_only: bool,
    /// What it is, and where in the machine.
    pub what: String,
}

/// A line of `block-list`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestDisk {
    /// The guest.
    pub guest: String,
    /// Its domain.
    pub domain: DomainId,
    /// The name of the disk in the guest: `xvda`.
    pub vdev: String,
    /// The number of the device: 51712 for xvda.
    pub device: u32,
    /// What the disk is made of.
    pub target: String,
    /// `r` or `w`.
    pub mode: &'static str,
    /// The back end's state, in words.
    pub state: &'static str,
    /// Reads that succeeded.
    pub reads: u64,
    /// Writes that succeeded.
    pub writes: u64,
    /// Flushes that succeeded.
    pub flushes: u64,
    /// Discards that succeeded.
    pub discards: u64,
    /// Sectors of 512 bytes of those reads.
    pub sectors_read: u64,
    /// Sectors of 512 bytes of those writes.
    pub sectors_written: u64,
    /// Requests that failed, and requests that broke a rule.
    pub errors: u64,
    /// KiB of dom0's memory that the overlay holds now; 0 without an overlay.
    pub overlay_kib: u64,
}

/// A line of `networks`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkRow {
    /// The name.
    pub name: String,
    /// Where it leads.
    pub kind: &'static str,
    /// How many devices of guests it has.
    pub vifs: usize,
    /// dom0's own address on it, and the bits of the network's part: `10.77.0.1/24`. `None` if dom0 has no address.
    pub address: Option<String>,
    /// The device of the machine that it leads to, with what dom0 knows of it. `None` if there is none.
    pub uplink: Option<String>,
    /// What that device has done. `None` if there is none.
    pub device: Option<NetworkDevice>,
}

/// What a network device of the machine has done since its network was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkDevice {
    /// Whether the device works and its link is up.
    pub link: bool,
    /// Frames that arrived.
    pub received: u64,
    /// Bytes of those frames.
    pub received_bytes: u64,
    /// Frames that were sent.
    pub sent: u64,
    /// Bytes of those frames.
    pub sent_bytes: u64,
    /// How often the device was reset.
    pub resets: u64,
    /// Frames of either direction that were dropped, by the reason.
    pub drops: Vec<(&'static str, u64)>,
}

/// A line of `network-list`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestVif {
    /// The guest.
    pub guest: String,
    /// Its domain.
    pub domain: DomainId,
    /// The number of the device in the guest.
    pub device: u32,
    /// The device's address.
    pub mac: String,
    /// The network.
    pub bridge: String,
    /// The IPv4 address that dom0 offers the guest.
    pub ip: Option<String>,
    /// The back end's state, in words.
    pub state: &'static str,
    /// Packets that the guest received.
    pub received: u64,
    /// Bytes of those packets.
    pub received_bytes: u64,
    /// Packets that the guest sent.
    pub sent: u64,
    /// Bytes of those packets.
    pub sent_bytes: u64,
    /// Packets that were dropped, by the reason.
    pub drops: Vec<(&'static str, u64)>,
    /// Its connections that dom0 translates. `None` if the network is not translated, or the device is not connected.
    pub flows: Option<usize>,
}

/// The size of a guest without a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Size {
    /// The guest.
    pub name: String,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Number of vcpus.
    pub vcpus: u32,
}

/// A request to a guest to power off or reboot, for [`Manager::wait`](super::Manager::wait).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wait {
    /// The guest.
    pub name: String,
    /// The domain that the guest had when it was asked.
    pub domain: DomainId,
    /// What the guest was asked to do.
    pub wish: EndRequest,
}

/// Why a command was not carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// No guest has this name or number.
    NoGuest(String),
    /// The guest has ended and has no domain.
    HasEnded(String),
    /// `destroy` found a guest that has ended already.
    EndedAlready(String),
    /// The guest has ended, and the device of its disk has not answered yet.
    Parting(String),
    /// `create` found a guest that has not ended, or that is kept or will be made again.
    Exists(String),
    /// The guest could not be made; the reason was shown.
    NotMade(String),
    /// The guest waits to be made, is being made, or is being ended.
    InBetween(String),
    /// No guest can have this name, and why.
    BadName(String, &'static str),
    /// Another guest has this name.
    NameTaken(String),
    /// The guest cannot have as much or as little memory as was asked for. The number is its maximum in MiB.
    OutOfRange(String, u64),
    /// The machine has too little free memory.
    NoMemory {
        /// The guest.
        name: String,
        /// Memory the guest has, in MiB.
        has_mib: u64,
        /// Free memory of the machine, in MiB.
        free_mib: u64,
    },
    /// The guest was asked to reboot, but has ended and is not made again.
    DidNotComeBack(String),
    /// The hypervisor or the store refused something for this guest, and why.
    Guest(String, String),
    /// The hypervisor refused something, and why.
    Other(String),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoGuest(name) => write!(f, "there is no guest {}", name.escape_debug()),
            Self::HasEnded(name) => write!(f, "guest {name} has ended"),
            Self::EndedAlready(name) => write!(f, "guest {name} has ended already"),
            Self::Parting(name) => write!(f, "guest {name} has ended, and is destroyed once its devices are removed"),
            Self::Exists(name) => write!(f, "guest {name} exists"),
            Self::NotMade(name) => write!(f, "guest {name} was not made"),
            Self::InBetween(name) => write!(f, "guest {name} is being made or ended; try again"),
            Self::BadName(name, why) => write!(f, "{}: {why}", name.escape_debug()),
            Self::NameTaken(name) => write!(f, "there is a guest {name} already"),
            Self::OutOfRange(name, most) => write!(f, "guest {name} may have 1 to {most} MiB"),
            Self::NoMemory { name, has_mib, free_mib } => {
                write!(f, "guest {name} has {has_mib} MiB, and the machine only {free_mib} more")
            }
            Self::DidNotComeBack(name) => write!(f, "guest {name} did not come back"),
            Self::Guest(name, why) => write!(f, "guest {name}: {why}"),
            Self::Other(why) => f.write_str(why),
        }
    }
}

impl core::error::Error for Refusal {}

impl Refusal {
    /// The refusal as JSON, for a program.
    #[must_use]
    pub fn json(&self) -> String {
        Object::default().text("error", &self.to_string()).end()
    }
}

impl Reply {
    /// The reply as text, for a person; empty if there is nothing to show.
    #[must_use]
    pub fn text(&self) -> String {
        match self {
            Self::Done { .. } | Self::Asked { .. } | Self::Console(_) | Self::Quit => String::new(),
            Self::Created { name, domain } => format!("guest {name} is domain {domain}"),
            Self::Domid { domain, .. } => domain.to_string(),
            Self::Uptime { seconds, .. } => clock(*seconds),
            Self::Info(info) => info.text(),
            Self::List(rows) => rows.iter().fold(head(), |text, row| text + "\n" + &row.text()),
            Self::Disks(rows) if rows.is_empty() => "no disks".to_string(),
            Self::Disks(rows) => rows.iter().fold(disks_head(), |text, row| text + "\n" + &row.text()),
            Self::GuestDisks(rows) if rows.is_empty() => "no disks".to_string(),
            Self::GuestDisks(rows) => rows.iter().fold(guest_disks_head(), |text, row| text + "\n" + &row.text()),
            Self::Networks(rows) => rows.iter().fold(networks_head(), |text, row| text + "\n" + &row.text()),
            Self::GuestVifs(rows) if rows.is_empty() => "no network devices".to_string(),
            Self::GuestVifs(rows) => rows.iter().fold(guest_vifs_head(), |text, row| text + "\n" + &row.text()),
            Self::Log(lines) => lines.join("\n"),
            Self::Help(text) => text.clone(),
        }
    }

    /// The reply as JSON, for a program.
    #[must_use]
    pub fn json(&self) -> String {
        match self {
            Self::Done { verb, name } => done(verb, name).end(),
            Self::Asked { verb, wait } => done(verb, &wait.name).end(),
            Self::Console(name) => done("console", name).end(),
            Self::Quit => Object::default().text("done", "quit").end(),
            Self::Created { name, domain } => done("create", name).raw("domid", domain).end(),
            Self::Domid { name, domain } => Object::default().text("name", name).raw("domid", domain).end(),
            Self::Uptime { name, seconds } => Object::default().text("name", name).raw("seconds", seconds).end(),
            Self::Info(info) => info.json(),
            Self::List(rows) => json::array(rows.iter().map(Row::json)),
            Self::Disks(rows) => json::array(rows.iter().map(DiskRow::json)),
            Self::GuestDisks(rows) => json::array(rows.iter().map(GuestDisk::json)),
            Self::Networks(rows) => json::array(rows.iter().map(NetworkRow::json)),
            Self::GuestVifs(rows) => json::array(rows.iter().map(GuestVif::json)),
            Self::Log(lines) => json::array(lines.iter().map(|line| json::text(line))),
            Self::Help(text) => Object::default().text("help", text).end(),
        }
    }
}

fn done(verb: &str, name: &str) -> Object {
    Object::default().text("done", verb).text("name", name)
}

/// A string in JSON, or `null`.
fn optional(text: Option<&str>) -> String {
    text.map_or_else(|| "null".to_string(), json::text)
}

fn head() -> String {
    format!("{:<20} {:>5} {:>8} {:>5} {:<5} {:>9}", "name", "id", "MiB", "vcpus", "state", "seconds")
}

fn disks_head() -> String {
    format!("{:<20} {:>10} {:>5} {:<6} {}", "serial", "size", "block", "access", "what")
}

fn guest_disks_head() -> String {
    let counts =
        format!("{:>9} {:>9} {:>9} {:>9} {:>6} {:>11}", "reads", "KiB", "writes", "KiB", "errors", "overlay KiB");
    format!("{:<20} {:<7} {:<4} {:<9} {counts}  {}", "guest", "vdev", "mode", "state", "target")
}

fn networks_head() -> String {
    format!("{:<15} {:<11} {:>5} {:<18} {}", "network", "kind", "vifs", "dom0's address", "uplink")
}

fn guest_vifs_head() -> String {
    let counts = format!("{:>9} {:>9} {:>9} {:>9} {:>7}", "received", "KiB", "sent", "KiB", "dropped");
    let device = format!("{:>3} {:<17} {:<15} {:<15} {:<9}", "dev", "mac", "network", "ip", "state");
    format!("{:<20} {device} {counts}", "guest")
}

/// Bytes in the largest unit of which they are a whole number.
fn size(bytes: u64) -> String {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    let whole = units.into_iter().find(|(shift, _)| bytes > 0 && bytes.trailing_zeros() >= *shift);
    let (shift, unit) = whole.unwrap_or((0, "B"));
    format!("{} {unit}", bytes >> shift)
}

/// Seconds as hours, minutes and seconds.
fn clock(seconds: u64) -> String {
    format!("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

impl MachineInfo {
    fn text(&self) -> String {
        let Self { abi, total_mib, free_mib, hypervisor_kib, dom0_kib, bundle_kib, cpus, domains, vcpus, .. } = self;
        let version = env!("CARGO_PKG_VERSION");
        format!(
            "version      Tenon {version} (Xen ABI {abi})\nmemory       {total_mib} MiB, of which {free_mib} MiB are free\n\
             hypervisor   {hypervisor_kib} KiB\ndom0         {dom0_kib} KiB, {} KiB of it for guests ({} KiB each, {} KiB for each disk, {} KiB for each vif), and {bundle_kib} KiB of boot bundle\n\
             CPUs         {cpus}\ndomains      {domains}, with {vcpus} vcpus online",
            self.for_guests_kib, self.each_guest_kib, self.each_disk_kib, self.each_vif_kib
        )
    }

    fn json(&self) -> String {
        Object::default()
            .text("version", env!("CARGO_PKG_VERSION"))
            .text("abi", &self.abi)
            .raw("total_mib", self.total_mib)
            .raw("free_mib", self.free_mib)
            .raw("hypervisor_kib", self.hypervisor_kib)
            .raw("dom0_kib", self.dom0_kib)
            .raw("for_guests_kib", self.for_guests_kib)
            .raw("each_guest_kib", self.each_guest_kib)
            .raw("each_disk_kib", self.each_disk_kib)
            .raw("each_vif_kib", self.each_vif_kib)
            .raw("bundle_kib", self.bundle_kib)
            .raw("cpus", self.cpus)
            .raw("domains", self.domains)
            .raw("vcpus", self.vcpus)
            .end()
    }
}

impl Row {
    fn text(&self) -> String {
        match self {
            Self::Domain { name, info } => format!("{name:<20} {}", Summary(info)),
            Self::Planned(size) => size.text("-----"),
            Self::Ended(size, None) => size.text("ended"),
            Self::Ended(size, Some(past)) => {
                let domain = past.domain.map_or_else(String::new, |domain| format!(" as domain {domain}"));
                format!("{}  {} at {}{domain}", size.text("ended"), past.how, clock(past.at_ns / 1_000_000_000))
            }
        }
    }

    fn json(&self) -> String {
        match self {
            Self::Domain { name, info } => {
                let tenths = info.cpu_time / 100_000_000;
                Object::default()
                    .text("name", name)
                    .raw("domid", info.domain)
                    .raw("memory_mib", info.tot_pages >> 8)
                    .raw("vcpus", info.nr_online_vcpus)
                    .text("state", &states(info))
                    .raw("seconds", format!("{}.{}", tenths / 10, tenths % 10))
                    .end()
            }
            Self::Planned(size) => size.json("-----").end(),
            Self::Ended(size, None) => size.json("ended").end(),
            Self::Ended(size, Some(past)) => size.json("ended").raw("ended", past.json()).end(),
        }
    }
}

impl DiskRow {
    fn text(&self) -> String {
        let Self { serial, bytes, block_bytes, read_only, what } = self;
        let (serial, access) = (serial.as_deref().unwrap_or("-"), if *read_only { "ro" } else { "rw" });
        format!("{serial:<20} {:>10} {block_bytes:>5} {access:<6} {what}", size(*bytes))
    }

    fn json(&self) -> String {
        let object = Object::default().raw("serial", optional(self.serial.as_deref())).raw("bytes", self.bytes);
        let object = object.raw("block_bytes", self.block_bytes).raw("read_only", self.read_only);
        object.text("what", &self.what).end()
    }
}

impl GuestDisk {
    fn text(&self) -> String {
        let Self { guest, vdev, mode, state, target, reads, writes, errors, overlay_kib, .. } = self;
        let (read, written) = (self.sectors_read / 2, self.sectors_written / 2);
        format!(
            "{guest:<20} {vdev:<7} {mode:<4} {state:<9} {reads:>9} {read:>9} {writes:>9} {written:>9} {errors:>6} {overlay_kib:>11}  {target}"
        )
    }

    fn json(&self) -> String {
        let object = Object::default().text("name", &self.guest).raw("domid", self.domain).text("vdev", &self.vdev);
        let object = object.raw("device", self.device).text("target", &self.target).text("mode", self.mode);
        let object = object.text("state", self.state).raw("reads", self.reads).raw("writes", self.writes);
        let object = object.raw("flushes", self.flushes).raw("discards", self.discards);
        let object = object.raw("sectors_read", self.sectors_read).raw("sectors_written", self.sectors_written);
        object.raw("errors", self.errors).raw("overlay_kib", self.overlay_kib).end()
    }
}

impl NetworkRow {
    fn text(&self) -> String {
        let Self { name, kind, vifs, .. } = self;
        let [address, uplink] = [&self.address, &self.uplink].map(|value| value.as_deref().unwrap_or("-"));
        let device = self.device.as_ref().map(NetworkDevice::text).unwrap_or_default();
        format!("{name:<15} {kind:<11} {vifs:>5} {address:<18} {uplink}{device}")
    }

    fn json(&self) -> String {
        let object = Object::default().text("network", &self.name).text("kind", self.kind).raw("vifs", self.vifs);
        let object = object.raw("address", optional(self.address.as_deref()));
        let object = object.raw("uplink", optional(self.uplink.as_deref()));
        match &self.device {
            Some(device) => object.raw("device", device.json()).end(),
            None => object.end(),
        }
    }
}

impl NetworkDevice {
    fn link(&self) -> &'static str {
        if self.link { "up" } else { "down" }
    }

    /// What follows the device's name.
    fn text(&self) -> String {
        let Self { received, sent, resets, .. } = self;
        let (in_kib, out_kib) = (self.received_bytes >> 10, self.sent_bytes >> 10);
        let dropped: u64 = self.drops.iter().map(|(_, count)| count).sum();
        let link = self.link();
        format!(
            ", link {link}, received {received} ({in_kib} KiB), sent {sent} ({out_kib} KiB), dropped {dropped}, resets {resets}"
        )
    }

    fn json(&self) -> String {
        let object = Object::default().text("link", self.link()).raw("received", self.received);
        let object = object.raw("received_bytes", self.received_bytes).raw("sent", self.sent);
        let object = object.raw("sent_bytes", self.sent_bytes).raw("resets", self.resets);
        object.raw("drops", drops(&self.drops)).end()
    }
}

/// The numbers of dropped packets, by the reason.
fn drops(drops: &[(&'static str, u64)]) -> String {
    drops.iter().fold(Object::default(), |object, (reason, count)| object.raw(reason, count)).end()
}

impl GuestVif {
    fn text(&self) -> String {
        let Self { guest, device, mac, bridge, state, received, sent, .. } = self;
        let ip = self.ip.as_deref().unwrap_or("-");
        let (in_kib, out_kib) = (self.received_bytes >> 10, self.sent_bytes >> 10);
        let dropped: u64 = self.drops.iter().map(|(_, count)| count).sum();
        format!(
            "{guest:<20} {device:>3} {mac:<17} {bridge:<15} {ip:<15} {state:<9} {received:>9} {in_kib:>9} {sent:>9} {out_kib:>9} {dropped:>7}"
        )
    }

    fn json(&self) -> String {
        let object = Object::default().text("name", &self.guest).raw("domid", self.domain).raw("device", self.device);
        let object =
            object.text("mac", &self.mac).text("network", &self.bridge).raw("ip", optional(self.ip.as_deref()));
        let object = object.text("state", self.state).raw("received", self.received);
        let object = object.raw("received_bytes", self.received_bytes).raw("sent", self.sent);
        let object = object.raw("sent_bytes", self.sent_bytes).raw("drops", drops(&self.drops));
        match self.flows {
            Some(flows) => object.raw("flows", flows).end(),
            None => object.end(),
        }
    }
}

impl Size {
    fn text(&self, state: &str) -> String {
        let Self { name, memory_mib, vcpus } = self;
        format!("{name:<20} {:>5} {memory_mib:>8} {vcpus:>5} {state:<5} {:>9}", "-", "-")
    }

    fn json(&self, state: &str) -> Object {
        let object = Object::default().text("name", &self.name).raw("domid", "null");
        let object = object.raw("memory_mib", self.memory_mib).raw("vcpus", self.vcpus);
        object.text("state", state).raw("seconds", "null")
    }
}

impl LastEnd {
    fn json(&self) -> String {
        let domain = self.domain.map_or_else(|| "null".to_string(), |domain| domain.to_string());
        let object = Object::default().text("how", self.how).raw("uptime", self.at_ns / 1_000_000_000);
        let refused = json::array(self.refused.iter().map(|line| json::text(line)));
        object.raw("domid", domain).text("report", &self.report).raw("refused", refused).end()
    }
}
