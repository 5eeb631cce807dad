//! A hypervisor and a store in maps. Both count what exists, so that a test sees what is left over, and both
//! can be told to refuse one call.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;

use guest_image::{MachineFrame, Pfn};
use hypercall_abi::context::VcpuContext;
use hypercall_abi::domctl::{DomainInfo, info};
use hypercall_abi::sysctl::PhysInfo;
use hypercall_abi::tenon::Refusals;
#[allow(unused_imports, reason = "shared by tests")]
pub(crate) use test_kernels::{BASE, halting as kernel};
use toolstack::config::GuestConfig;
use toolstack::create::Request;
use toolstack::{Access, DomainId, Hypervisor, Node, Progress, Store};

/// What several may call.
#[derive(Default)]
pub(crate) struct Shared<T>(pub(crate) RefCell<T>);

impl<T> Deref for Shared<T> {
    type Target = RefCell<T>;

    fn deref(&self) -> &RefCell<T> {
        &self.0
    }
}

/// Refuses its call number `after`.
#[derive(Default)]
pub(crate) struct Refusal {
    pub(crate) after: Option<usize>,
    pub(crate) calls: usize,
}

impl Refusal {
    fn call(&mut self, name: &str) -> Result<(), String> {
        self.calls += 1;
        if self.after == Some(self.calls) { Err(format!("{name} refused")) } else { Ok(()) }
    }
}

#[derive(Default)]
pub(crate) struct Domain {
    pub(crate) max_kib: u64,
    pub(crate) frames: BTreeMap<u64, Box<[u8; 4096]>>,
    pub(crate) m2p: BTreeMap<u64, u64>,
    pub(crate) ports: Vec<DomainId>,
    pub(crate) root: Option<u64>,
    /// Pinned L1 tables.
    pub(crate) leaves: BTreeSet<u64>,
    pub(crate) vcpu: Option<Box<VcpuContext>>,
    pub(crate) info: DomainInfo,
    pub(crate) crash: Option<(u32, String)>,
    pub(crate) refusals: Refusals,
}

/// Frames of a machine without guests.
pub(crate) const FREE: usize = 100_000;

#[derive(Default)]
pub(crate) struct Machine {
    pub(crate) domains: BTreeMap<u16, Domain>,
    pub(crate) free: usize,
    pub(crate) refusal: Refusal,
    /// What it has logged.
    pub(crate) log: Vec<u8>,
    /// Pages given, filled or freed since a test set this to 0.
    pub(crate) turn: usize,
    filled: Option<u64>,
    next_domain: u16,
    next_frame: u64,
}

/// Frames freed at once when a domain is destroyed.
const STEP: usize = 512;

/// Frame of a grant table: domain number plus this.
pub(crate) const GRANT_TABLE: u64 = 0x5_0000;

impl Machine {
    pub(crate) fn new() -> Shared<Self> {
        Shared(RefCell::new(Self { free: FREE, next_domain: 7, ..Self::default() }))
    }

    fn domain(&mut self, call: &str, domain: DomainId) -> Result<&mut Domain, String> {
        self.refusal.call(call)?;
        self.domains.get_mut(&domain.0).ok_or_else(|| "ESRCH".into())
    }
}

impl Hypervisor for Shared<Machine> {
    type Error = String;

    fn create(&self, uuid: &[u8; 16], vcpus: u32) -> Result<DomainId, String> {
        let mut machine = self.borrow_mut();
        machine.refusal.call("create")?;
        let id = machine.next_domain;
        machine.next_domain += 1;
        let info = DomainInfo {
            domain: id,
            flags: info::PAUSED,
            handle: *uuid,
            max_vcpu_id: vcpus - 1,
            nr_online_vcpus: 1,
            shared_info_frame: 0x4_0000 + u64::from(id),
            ..DomainInfo::default()
        };
        let mut domain = Domain { info, ..Domain::default() };
        domain.frames.insert(GRANT_TABLE + u64::from(id), Box::new([0; 4096]));
        machine.domains.insert(id, domain);
        Ok(DomainId(id))
    }

    fn set_max_memory(&self, domain: DomainId, kib: u64) -> Result<(), String> {
        self.borrow_mut().domain("set_max_memory", domain)?.max_kib = kib;
        Ok(())
    }

    fn populate(&self, domain: DomainId, first: Pfn, frames: &mut [MachineFrame]) -> Result<usize, String> {
        let mut machine = self.borrow_mut();
        machine.turn += frames.len();
        let got = frames.len().min(machine.free);
        let next = machine.next_frame;
        let domain = machine.domain("populate", domain)?;
        for (i, frame) in (0u64..).zip(&mut frames[..got]) {
            // Downwards, and never beginning at 0.
            frame.0 = 0x3_ffff - next - i;
            domain.frames.insert(frame.0, Box::new([0; 4096]));
            domain.m2p.insert(frame.0, first.0 + i);
            domain.info.tot_pages += 1;
        }
        assert!(domain.info.tot_pages * 4 <= domain.max_kib, "more than its limit");
        machine.next_frame += got as u64;
        machine.free -= got;
        Ok(got)
    }

    fn write(&self, domain: DomainId, frame: MachineFrame, offset: usize, bytes: &[u8]) -> Result<(), String> {
        let mut machine = self.borrow_mut();
        let domain = machine.domain("write", domain)?;
        let page = domain.frames.get_mut(&frame.0).ok_or("not its frame")?;
        page[offset..offset + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn fill(
        &self,
        domain: DomainId,
        frames: &[MachineFrame],
        pfn: Pfn,
        offset: usize,
        bytes: &[u8],
    ) -> Result<(), String> {
        let frame = frames[usize::try_from(pfn.0).unwrap()];
        {
            let machine = &mut *self.borrow_mut();
            machine.turn += usize::from(machine.filled.replace(pfn.0) != Some(pfn.0));
            if let Some(domain) = machine.domains.get(&domain.0) {
                assert_eq!(domain.m2p[&frame.0], pfn.0, "another page's frame");
            }
        }
        self.write(domain, frame, offset, bytes)
    }

    fn open_port(&self, domain: DomainId, remote: DomainId) -> Result<u32, String> {
        let mut machine = self.borrow_mut();
        let domain = machine.domain("open_port", domain)?;
        domain.ports.push(remote);
        Ok(u32::try_from(domain.ports.len()).unwrap())
    }

    fn grant_table(&self, domain: DomainId) -> Result<MachineFrame, String> {
        self.borrow_mut().domain("grant_table", domain)?;
        Ok(MachineFrame(GRANT_TABLE + u64::from(domain.0)))
    }

    fn pin_leaves(&self, domain: DomainId, frames: &[MachineFrame]) -> Result<(), String> {
        let mut machine = self.borrow_mut();
        // Each has as many entries as a piece has pages for all of them.
        machine.turn += frames.len() * 64;
        let domain = machine.domain("pin_leaves", domain)?;
        assert!(frames.iter().all(|frame| domain.m2p.contains_key(&frame.0) && domain.leaves.insert(frame.0)));
        Ok(())
    }

    fn unpin_leaves(&self, domain: DomainId, frames: &[MachineFrame]) -> Result<(), String> {
        let mut machine = self.borrow_mut();
        let domain = machine.domain("unpin_leaves", domain)?;
        assert!(domain.root.is_some() && frames.iter().all(|frame| domain.leaves.remove(&frame.0)));
        Ok(())
    }

    fn pin_root(&self, domain: DomainId, frame: MachineFrame) -> Result<(), String> {
        self.borrow_mut().domain("pin_root", domain)?.root = Some(frame.0);
        Ok(())
    }

    fn set_vcpu(&self, domain: DomainId, vcpu: u32, context: &VcpuContext) -> Result<(), String> {
        assert_eq!(vcpu, 0);
        let mut machine = self.borrow_mut();
        let domain = machine.domain("set_vcpu", domain)?;
        assert_eq!(domain.root.map(|root| root << 12), Some(context.ctrlreg[3]), "an unpinned root");
        domain.vcpu = Some(Box::new(*context));
        Ok(())
    }

    fn vcpu(&self, domain: DomainId, vcpu: u32) -> Result<Box<VcpuContext>, String> {
        assert_eq!(vcpu, 0);
        self.borrow_mut().domain("vcpu", domain)?.vcpu.clone().ok_or_else(|| "no context".into())
    }

    fn unpause(&self, domain: DomainId) -> Result<(), String> {
        let mut machine = self.borrow_mut();
        let domain = machine.domain("unpause", domain)?;
        assert!(domain.vcpu.is_some(), "a domain without a vcpu runs");
        assert!(domain.leaves.is_empty(), "a guest could not write its own page tables any more");
        domain.info.flags &= !info::PAUSED;
        Ok(())
    }

    fn pause(&self, domain: DomainId) -> Result<(), String> {
        self.borrow_mut().domain("pause", domain)?.info.flags |= info::PAUSED;
        Ok(())
    }

    fn destroy(&self, domain: DomainId) -> Result<Progress, String> {
        let mut machine = self.borrow_mut();
        machine.turn += STEP;
        let dying = machine.domain("destroy", domain)?;
        dying.info.flags |= info::DYING;
        let freed = usize::try_from(dying.info.tot_pages).unwrap().min(STEP);
        dying.info.tot_pages -= freed as u64;
        let done = dying.info.tot_pages == 0;
        machine.free += freed;
        if done {
            machine.domains.remove(&domain.0);
        }
        Ok(if done { Progress::Done } else { Progress::More })
    }

    fn info(&self, from: DomainId) -> Result<Option<DomainInfo>, String> {
        let mut machine = self.borrow_mut();
        machine.refusal.call("info")?;
        Ok(machine.domains.range(from.0..).next().map(|(_, domain)| domain.info))
    }

    fn refusals(&self, domain: DomainId) -> Result<Refusals, String> {
        Ok(self.borrow_mut().domain("refusals", domain)?.refusals)
    }

    fn crash_report(&self, domain: DomainId) -> Result<Option<(u32, String)>, String> {
        Ok(self.borrow_mut().domain("crash_report", domain)?.crash.clone())
    }

    fn physical_info(&self) -> Result<PhysInfo, String> {
        let mut machine = self.borrow_mut();
        machine.refusal.call("physinfo")?;
        Ok(PhysInfo { nr_cpus: 2, total_pages: 200_000, free_pages: machine.free as u64, ..PhysInfo::default() })
    }

    fn version(&self) -> String {
        "4.17.0-fake".into()
    }

    fn read_log(&self, from: u32, clear: bool, to: &mut [u8]) -> Result<(usize, u32), String> {
        let mut machine = self.borrow_mut();
        machine.refusal.call("readconsole")?;
        let at = usize::try_from(from).unwrap();
        let count = to.len().min(machine.log.len() - at);
        to[..count].copy_from_slice(&machine.log[at..at + count]);
        if clear {
            machine.log.drain(..at);
        }
        Ok((count, from + u32::try_from(count).unwrap()))
    }
}

#[derive(Default)]
pub(crate) struct Tree {
    pub(crate) nodes: BTreeMap<String, (String, Access)>,
    pub(crate) served: BTreeMap<u16, (u64, u32)>,
    /// Domains of which it heard that they shut down.
    pub(crate) shut_down: Vec<u16>,
    /// Memory is set aside for a guest that is not introduced yet.
    pub(crate) reserved: bool,
    /// There is no memory to set aside.
    pub(crate) full: bool,
    pub(crate) refusal: Refusal,
}

impl Store for Shared<Tree> {
    type Error = String;

    fn write(&self, _: DomainId, nodes: &[Node]) -> Result<(), String> {
        self.borrow_mut().refusal.call("write")?;
        self.borrow_mut().nodes.extend(nodes.iter().map(|node| (node.path.clone(), (node.value.clone(), node.access))));
        Ok(())
    }

    fn remove(&self, path: &str) -> Result<(), String> {
        self.borrow_mut().refusal.call("remove")?;
        let below = format!("{path}/");
        self.borrow_mut().nodes.retain(|node, _| node != path && !node.starts_with(&below));
        Ok(())
    }

    fn introduce(&self, domain: DomainId, page: MachineFrame, port: u32) -> Result<(), String> {
        self.borrow_mut().refusal.call("introduce")?;
        assert!(self.borrow().nodes.contains_key(&format!("/local/domain/{domain}/control/shutdown")), "no tree yet");
        let mut tree = self.borrow_mut();
        tree.served.insert(domain.0, (page.0, port));
        tree.reserved = false;
        Ok(())
    }

    fn release(&self, domain: DomainId) -> Result<(), String> {
        self.borrow_mut().refusal.call("release")?;
        self.borrow_mut().served.remove(&domain.0);
        Ok(())
    }

    fn domain_shut_down(&self, domain: DomainId) {
        self.borrow_mut().shut_down.push(domain.0);
    }

    fn is_settled(&self) -> bool {
        true
    }

    fn reserve(&self) -> bool {
        let mut tree = self.borrow_mut();
        tree.reserved |= !tree.full;
        tree.reserved
    }

    fn give_back(&self) {
        self.borrow_mut().reserved = false;
    }
}

pub(crate) fn config() -> GuestConfig {
    let text = "name = 'web'\nmemory = 16\nvcpus = 2\nkernel = 'vmlinuz'\nextra = 'console=hvc0'\n";
    GuestConfig::parse(text).unwrap()
}

pub(crate) const UUID: [u8; 16] = [0xab; 16];

pub(crate) fn request<'a>(config: &'a GuestConfig, kernel: &'a [u8]) -> Request<'a> {
    Request { config, kernel, ramdisk: &[], uuid: UUID, backend: DomainId(3) }
}
