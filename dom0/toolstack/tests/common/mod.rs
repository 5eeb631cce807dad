//! A hypervisor and a store in maps. Both count what exists, so that a test sees what is left over, and both
//! can be told to refuse one call.

use std::collections::BTreeMap;

use guest_image::{MachineFrame, Pfn};
use hypercall_abi::context::VcpuContext;
use hypercall_abi::domctl::{DomainInfo, info};
use hypercall_abi::tenon::Refusals;
pub(crate) use test_kernels::{BASE, halting as kernel};
use toolstack::config::GuestConfig;
use toolstack::create::Request;
use toolstack::{Access, DomainId, Hypervisor, Node, Store};

/// Refuses its call number `n`.
#[derive(Default)]
pub(crate) struct Refusal {
    pub(crate) after: Option<usize>,
    calls: usize,
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
    pub(crate) vcpu: Option<Box<VcpuContext>>,
    pub(crate) info: DomainInfo,
    pub(crate) crash: Option<(u32, String)>,
    pub(crate) refusals: Refusals,
}

#[derive(Default)]
pub(crate) struct Machine {
    pub(crate) domains: BTreeMap<u16, Domain>,
    pub(crate) free: usize,
    pub(crate) refusal: Refusal,
    next_domain: u16,
    next_frame: u64,
}

/// Frame of a grant table: domain number plus this.
pub(crate) const GRANT_TABLE: u64 = 0x5_0000;

impl Machine {
    pub(crate) fn new() -> Self {
        Self { free: 100_000, next_domain: 7, ..Self::default() }
    }

    fn domain(&mut self, call: &str, domain: DomainId) -> Result<&mut Domain, String> {
        self.refusal.call(call)?;
        self.domains.get_mut(&domain.0).ok_or_else(|| "ESRCH".into())
    }
}

impl Hypervisor for Machine {
    type Error = String;

    fn create(&mut self, uuid: &[u8; 16], vcpus: u32) -> Result<DomainId, String> {
        self.refusal.call("create")?;
        let id = self.next_domain;
        self.next_domain += 1;
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
        self.domains.insert(id, domain);
        Ok(DomainId(id))
    }

    fn set_max_memory(&mut self, domain: DomainId, kib: u64) -> Result<(), String> {
        self.domain("set_max_memory", domain)?.max_kib = kib;
        Ok(())
    }

    fn populate(&mut self, domain: DomainId, first: Pfn, frames: &mut [MachineFrame]) -> Result<usize, String> {
        let got = frames.len().min(self.free);
        let next = self.next_frame;
        let domain = self.domain("populate", domain)?;
        for (i, frame) in (0u64..).zip(&mut frames[..got]) {
            // Downwards, and never beginning at 0.
            frame.0 = 0x3_ffff - next - i;
            domain.frames.insert(frame.0, Box::new([0; 4096]));
            domain.m2p.insert(frame.0, first.0 + i);
            domain.info.tot_pages += 1;
        }
        assert!(domain.info.tot_pages * 4 <= domain.max_kib, "more than its limit");
        self.next_frame += got as u64;
        self.free -= got;
        Ok(got)
    }

    fn write(&mut self, domain: DomainId, frame: MachineFrame, offset: usize, bytes: &[u8]) -> Result<(), String> {
        let domain = self.domain("write", domain)?;
        let page = domain.frames.get_mut(&frame.0).ok_or("not its frame")?;
        page[offset..offset + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn fill(
        &mut self,
        domain: DomainId,
        frames: &[MachineFrame],
        pfn: Pfn,
        offset: usize,
        bytes: &[u8],
    ) -> Result<(), String> {
        let frame = frames[usize::try_from(pfn.0).unwrap()];
        assert_eq!(self.domains[&domain.0].m2p[&frame.0], pfn.0, "another page's frame");
        self.write(domain, frame, offset, bytes)
    }

    fn open_port(&mut self, domain: DomainId, remote: DomainId) -> Result<u32, String> {
        let domain = self.domain("open_port", domain)?;
        domain.ports.push(remote);
        Ok(u32::try_from(domain.ports.len()).unwrap())
    }

    fn grant_table(&mut self, domain: DomainId) -> Result<MachineFrame, String> {
        self.domain("grant_table", domain)?;
        Ok(MachineFrame(GRANT_TABLE + u64::from(domain.0)))
    }

    fn pin_root(&mut self, domain: DomainId, frame: MachineFrame) -> Result<(), String> {
        self.domain("pin_root", domain)?.root = Some(frame.0);
        Ok(())
    }

    fn set_vcpu(&mut self, domain: DomainId, vcpu: u32, context: &VcpuContext) -> Result<(), String> {
        assert_eq!(vcpu, 0);
        let domain = self.domain("set_vcpu", domain)?;
        assert_eq!(domain.root.map(|root| root << 12), Some(context.ctrlreg[3]), "an unpinned root");
        domain.vcpu = Some(Box::new(*context));
        Ok(())
    }

    fn vcpu(&mut self, domain: DomainId, vcpu: u32) -> Result<Box<VcpuContext>, String> {
        assert_eq!(vcpu, 0);
        self.domain("vcpu", domain)?.vcpu.clone().ok_or_else(|| "no context".into())
    }

    fn unpause(&mut self, domain: DomainId) -> Result<(), String> {
        let domain = self.domain("unpause", domain)?;
        assert!(domain.vcpu.is_some(), "a domain without a vcpu runs");
        domain.info.flags &= !info::PAUSED;
        Ok(())
    }

    fn pause(&mut self, domain: DomainId) -> Result<(), String> {
        self.domain("pause", domain)?.info.flags |= info::PAUSED;
        Ok(())
    }

    fn destroy(&mut self, domain: DomainId) -> Result<(), String> {
        self.domain("destroy", domain)?;
        let gone = self.domains.remove(&domain.0).unwrap();
        self.free += usize::try_from(gone.info.tot_pages).unwrap();
        Ok(())
    }

    fn info(&mut self, from: DomainId) -> Result<Option<DomainInfo>, String> {
        self.refusal.call("info")?;
        Ok(self.domains.range(from.0..).next().map(|(_, domain)| domain.info))
    }

    fn refusals(&mut self, domain: DomainId) -> Result<Refusals, String> {
        Ok(self.domain("refusals", domain)?.refusals)
    }

    fn crash_report(&mut self, domain: DomainId) -> Result<Option<(u32, String)>, String> {
        Ok(self.domain("crash_report", domain)?.crash.clone())
    }
}

#[derive(Default)]
pub(crate) struct Tree {
    pub(crate) nodes: BTreeMap<String, (String, Access)>,
    pub(crate) served: BTreeMap<u16, (u64, u32)>,
    pub(crate) refusal: Refusal,
}

impl Store for Tree {
    type Error = String;

    fn write(&mut self, _: DomainId, nodes: &[Node]) -> Result<(), String> {
        self.refusal.call("write")?;
        self.nodes.extend(nodes.iter().map(|node| (node.path.clone(), (node.value.clone(), node.access))));
        Ok(())
    }

    fn remove(&mut self, path: &str) -> Result<(), String> {
        self.refusal.call("remove")?;
        let below = format!("{path}/");
        self.nodes.retain(|node, _| node != path && !node.starts_with(&below));
        Ok(())
    }

    fn introduce(&mut self, domain: DomainId, page: MachineFrame, port: u32) -> Result<(), String> {
        self.refusal.call("introduce")?;
        assert!(self.nodes.contains_key(&format!("/local/domain/{domain}/control/shutdown")), "no tree yet");
        self.served.insert(domain.0, (page.0, port));
        Ok(())
    }

    fn release(&mut self, domain: DomainId) -> Result<(), String> {
        self.refusal.call("release")?;
        self.served.remove(&domain.0);
        Ok(())
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
