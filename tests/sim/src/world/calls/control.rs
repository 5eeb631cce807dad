//! Calls about domains and the machine: those of a controller, and questions that everybody may ask.

use super::{Args, Invented, Pen};
use crate::world::build::{self, at, page};
use hv_core::addr::Frame;
use hv_core::frame::Owner;
use hv_core::machine::Frames;
use hypercall_abi::Hypercall;
use hypercall_abi::domctl::{
    CreateDomain, Domctl, DomctlOp, INTERFACE_VERSION, IomemPermission, MaxMem, MaxVcpus, VcpuContextArg,
};
use hypercall_abi::physdev::ConsoleIo;
use hypercall_abi::sysctl::{self, Sysctl, SysctlOp};
use hypercall_abi::tenon::{BindMessage, TenonOp};
use hypercall_abi::version::{FeatureInfo, VersionOp};
use zerocopy::IntoBytes;

impl Pen<'_, '_> {
    pub(super) fn domctl(&mut self, args: &mut Args) -> &'static str {
        let (mut op, mut number) = self.op(DomctlOp::ALL, DomctlOp::number);
        let domains = self.others().len();
        let skip = match op {
            Some(DomctlOp::CreateDomain) => domains > 4 && !self.rng.one_in(8),
            Some(DomctlOp::DestroyDomain) => domains < 4 && !self.rng.one_in(4),
            _ => false,
        };
        if skip {
            (op, number) = (Some(DomctlOp::GetDomainInfo), DomctlOp::GetDomainInfo.number());
        }
        let domain = self.other();
        args[0] = self.domctl_of(op, number as u32, domain);
        op.map_or("?", DomctlOp::name)
    }

    fn domctl_of(&mut self, op: Option<DomctlOp>, cmd: u32, domain: u16) -> u64 {
        let mut call = Domctl { cmd, interface_version: INTERFACE_VERSION, domain, pad: [0; 3], payload: [0; 128] };
        let mut payload = |bytes: &[u8]| call.payload[..bytes.len()].copy_from_slice(bytes);
        match op {
            Some(DomctlOp::CreateDomain) => {
                let max_vcpus = self.mostly(&[1, 2, 2, 3, 0, 33]) as u32;
                payload(CreateDomain { max_vcpus, ..Default::default() }.as_bytes());
            }
            Some(DomctlOp::MaxMem) => payload(MaxMem { max_memkb: self.mostly(&[136, 160, 0]) }.as_bytes()),
            Some(DomctlOp::IomemPermission) => {
                let (first_frame, nr_frames) =
                    (self.ctx.m.frame_limit() + self.rng.below(3) as u64, self.mostly(&[1, 2, 0]));
                let allow = u8::from(!self.rng.one_in(8));
                payload(IomemPermission { first_frame, nr_frames, allow, pad: [0; 7] }.as_bytes());
            }
            Some(DomctlOp::MaxVcpus) => payload(MaxVcpus { max: self.small32(4) }.as_bytes()),
            Some(DomctlOp::SetVcpuContext | DomctlOp::GetVcpuContext) => {
                let pages = self.foreign_pages(domain);
                let to = self.place(0x1430);
                if op == Some(DomctlOp::SetVcpuContext) && pages.len() == build::PAGES {
                    self.put_at(to, &build::context(&pages));
                }
                let vcpu = self.small32(2);
                payload(VcpuContextArg { vcpu, pad: 0, context: to }.as_bytes());
                // The structure is larger than a page: the call itself goes elsewhere.
                let call_at = at(page::DATA) + 8 * self.rng.below(64) as u64;
                self.write(call_at, call.as_bytes());
                return call_at;
            }
            _ => {}
        }
        self.put(&call)
    }

    /// What looks like the first pages of another domain, by the machine-to-physical table.
    fn foreign_pages(&self, id: u16) -> Vec<Frame> {
        let owned = |frame: &Frame| {
            let owner = self.ctx.world.frames.info(*frame).map(|info| info.owner.owner);
            matches!(owner, Some(Owner::Guest(owner)) if owner.0 == id)
        };
        let limit = self.ctx.m.frame_limit();
        let mut pages: Vec<(u64, Frame)> = (0..limit)
            .filter_map(Frame::new)
            .filter(owned)
            .map(|frame| (self.ctx.m.m2p(frame), frame))
            .filter(|(pfn, _)| *pfn < build::PAGES as u64)
            .collect();
        pages.sort();
        pages.dedup_by_key(|(pfn, _)| *pfn);
        pages.into_iter().map(|(_, frame)| frame).collect()
    }

    /// The call with which a reaper unmakes a domain: no mistakes.
    pub fn destroy(&mut self, domain: u16) -> Invented {
        self.control(domain, DomctlOp::DestroyDomain, "DestroyDomain", &[])
    }

    /// A domain is paused, or runs again: no mistakes.
    pub fn pause(&mut self, domain: u16) -> Invented {
        let pauses = self.rng.one_in(3);
        let (op, name) =
            if pauses { (DomctlOp::PauseDomain, "PauseDomain") } else { (DomctlOp::UnpauseDomain, "UnpauseDomain") };
        self.control(domain, op, name, &[])
    }

    /// A domain may own so many frames from now on: no mistakes.
    pub fn set_limit(&mut self, domain: u16, frames: u64) -> Invented {
        self.control(domain, DomctlOp::MaxMem, "MaxMem", MaxMem { max_memkb: 4 * frames }.as_bytes())
    }

    fn control(&mut self, domain: u16, op: DomctlOp, name: &'static str, payload: &[u8]) -> Invented {
        let mut call = Domctl { cmd: op as u32, interface_version: INTERFACE_VERSION, domain, ..Domctl::default() };
        call.payload[..payload.len()].copy_from_slice(payload);
        let to = at(page::CODE) + 0xc00 + 0x100 * u64::from(self.ctx.vcpu.number().0);
        self.write(to, call.as_bytes());
        Invented { call: Hypercall::Domctl, op: name, args: [to, 0, 0, 0, 0, 0], status: None }
    }

    pub(super) fn sysctl(&mut self, args: &mut Args) -> &'static str {
        let (op, number) = self.op(SysctlOp::ALL, SysctlOp::number);
        let call = Sysctl { cmd: number as u32, interface_version: sysctl::INTERFACE_VERSION, payload: [0; 128] };
        args[0] = self.put(&call);
        op.map_or("?", SysctlOp::name)
    }

    pub(super) fn tenon(&mut self, args: &mut Args) -> &'static str {
        let (op, number) = self.op(TenonOp::ALL, TenonOp::number);
        (args[0], args[1], args[2]) = (number, u64::from(self.other()), self.place(328));
        if op == Some(TenonOp::BindMessage) {
            let vcpu = self.vcpu();
            args[1] = self.domid().into();
            args[2] = self.put(&BindMessage { vcpu, ..Default::default() });
        }
        op.map_or("?", TenonOp::name)
    }

    pub(super) fn version(&mut self, args: &mut Args) -> &'static str {
        let (op, number) = self.op(VersionOp::ALL, VersionOp::number);
        args[0] = number;
        args[1] = match op {
            Some(VersionOp::GetFeatures) => self.put(&FeatureInfo { submap_idx: 0, submap: 0 }),
            Some(VersionOp::Pagesize) => self.mostly(&[0]),
            _ => self.place(1024),
        };
        op.map_or("?", VersionOp::name)
    }

    pub(super) fn console(&mut self, args: &mut Args) -> &'static str {
        let (op, number) = self.op(ConsoleIo::ALL, ConsoleIo::number);
        args[0] = number;
        args[1] = self.mostly(&[0, 1, 100, 3000]);
        args[2] = self.place(3000);
        op.map_or("?", ConsoleIo::name)
    }
}
