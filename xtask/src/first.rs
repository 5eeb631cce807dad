//! Plans the first domain: its memory is laid out here, on the host, so that ring 0 need not parse a kernel.
//!
//! The plan is the one dom0's toolstack makes for its guests ([`guest_image`]); it is carried out on pages of our own, in
//! which a page's frame is its number, and written down in the form of [`hypercall_abi::first`].

use crate::kernel_file;
use anyhow::{Context, Result, anyhow, ensure};
use guest_image::{Builder, Config, Kernel, MachineFrame, Pfn, Plan, Wiring};
use hypercall_abi::first::{FirstImage, MAGIC, MAX_PAGES, PAGE, Run};
use hypercall_abi::start_info::flags;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs;
use std::path::Path;
use zerocopy::IntoBytes;

const PAGES_PER_MIB: u64 = 256;

/// Who the first domain is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Our dom0: it is told that it is privileged.
    Dom0,
    /// Another kernel: it has the machine's console if it does without the firmware's memory, and no authority.
    Guest,
}

/// Plans the kernel in `file` with so much memory, and writes the plan down.
///
/// # Errors
/// A file that cannot be read, unpacked or planned, each with what was wrong.
pub fn image(file: &Path, memory_mib: u64, cmdline: &str, role: Role) -> Result<Vec<u8>> {
    let name = file.display();
    let most = MAX_PAGES / PAGES_PER_MIB;
    ensure!(memory_mib <= most, "{name}: {memory_mib} MiB, and the first domain can have {most}");
    let bytes = fs::read(file).with_context(|| format!("cannot read {name}"))?;
    let elf = toolstack::unpack::unpack(&bytes, kernel_file::UNPACKED_LIMIT).map_err(|why| anyhow!("{name}: {why}"))?;
    let kernel = Kernel::parse(&elf).map_err(|why| anyhow!("{name}: {why}"))?;
    let takes_ramdisk = kernel.unmapped_ramdisk;
    let config = Config {
        nr_pages: memory_mib * PAGES_PER_MIB,
        ramdisk: &[],
        command_line: cmdline.as_bytes(),
        flags: match role {
            Role::Dom0 => flags::PRIVILEGED | flags::INITDOMAIN,
            // Told to be the first, it speaks to the hypervisor's console: nobody is at the other end of a ring.
            Role::Guest if kernel_file::looks_at_firmware(&elf) => 0,
            Role::Guest => flags::INITDOMAIN,
        },
        rings: false,
    };
    let plan = Plan::new(kernel, config).map_err(|why| anyhow!("{name}: {why}"))?;
    let mut pages = Pages { pages: BTreeMap::new(), nr_pages: config.nr_pages };
    let start = plan.construct(&mut pages, &Wiring::default()).map_err(|why| anyhow!("{name}: {why}"))?;
    let layout = &plan.layout;
    let header = FirstImage {
        magic: MAGIC,
        nr_pages: config.nr_pages,
        entry: start.entry,
        stack: start.stack,
        start_info: start.start_info,
        start_info_page: layout.start_info.0,
        root_page: start.root.0,
        p2m_page: layout.p2m.start,
        tables: [layout.tables.start, layout.tables.end],
        more_tables: [layout.p2m_tables.start, layout.p2m_tables.end],
        takes_ramdisk: u64::from(takes_ramdisk),
    };
    pages.pages.retain(|pfn, content| !layout.p2m.contains(*pfn) && content.iter().any(|byte| *byte != 0));
    let mut out = header.as_bytes().to_vec();
    for run in pages.runs() {
        out.extend_from_slice(Run { page: run[0].0, count: run.len() as u64 }.as_bytes());
        run.iter().for_each(|(_, content)| out.extend_from_slice(*content));
    }
    Ok(out)
}

struct Pages {
    pages: BTreeMap<u64, Box<[u8; PAGE]>>,
    nr_pages: u64,
}

impl Pages {
    /// The pages that are not zero, those that follow each other together.
    fn runs(&self) -> Vec<Vec<(u64, &[u8; PAGE])>> {
        let mut runs: Vec<Vec<(u64, &[u8; PAGE])>> = Vec::new();
        for (&pfn, content) in &self.pages {
            match runs.last_mut() {
                Some(run) if run.last().is_some_and(|(last, _)| last + 1 == pfn) => run.push((pfn, content)),
                _ => runs.push(vec![(pfn, content)]),
            }
        }
        runs
    }
}

impl Builder for Pages {
    type Error = Infallible;

    fn frame_of(&mut self, pfn: Pfn) -> Result<MachineFrame, Infallible> {
        assert!(pfn.0 < self.nr_pages, "the plan stays inside the domain");
        Ok(MachineFrame(pfn.0))
    }

    fn write(&mut self, pfn: Pfn, offset: usize, bytes: &[u8]) -> Result<(), Infallible> {
        let page = self.pages.entry(pfn.0).or_insert_with(|| Box::new([0; PAGE]));
        page[offset..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn zero(&mut self, _: Pfn, _: usize, _: usize) -> Result<(), Infallible> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromBytes;

    #[test]
    fn a_bad_kernel_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("kernel");
        fs::write(&file, b"no kernel").expect("written");
        let error = image(&file, 64, "", Role::Guest).expect_err("not a kernel").to_string();
        assert!(error.contains("kernel: "), "{error}");
    }

    /// A kernel is planned alike whether it is gzip'ed or not, and a damaged one is named.
    #[test]
    fn a_gzipped_kernel_is_planned() {
        let folder = tempfile::tempdir().expect("a folder");
        let plan = |name: &str, content: &[u8]| {
            let file = folder.path().join(name);
            fs::write(&file, content).expect("written");
            image(&file, 64, "", Role::Guest)
        };
        let packed = test_kernels::gzipped(&test_kernels::halting());
        let plain = plan("vmlinux", &test_kernels::halting()).expect("a kernel");
        assert!(plan("vmlinux.gz", &packed).expect("a kernel") == plain);
        let refusal = plan("cut.gz", &packed[..packed.len() - 4]).expect_err("cut off").to_string();
        assert!(refusal.contains("cut.gz: the"), "{refusal}");
    }

    #[test]
    fn runs_join_pages_in_a_row() {
        let page = || Box::new([1; PAGE]);
        let pages = Pages { pages: BTreeMap::from([(3, page()), (4, page()), (9, page())]), nr_pages: 16 };
        let runs = pages.runs();
        assert_eq!(runs.iter().map(|run| (run[0].0, run.len())).collect::<Vec<_>>(), [(3, 2), (9, 1)]);
        let run = Run { page: 3, count: 2 };
        assert_eq!(Run::read_from_bytes(run.as_bytes()), Ok(run));
    }
}
