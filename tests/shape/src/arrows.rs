//! Which crate may depend on which.

use crate::source::Crate;

/// What a crate may depend on.
struct Allowed {
    name: &'static str,
    /// Crates of the workspace.
    ours: &'static [&'static str],
    /// Crates of others; `None` where any will do because the crate never runs in ring 0.
    theirs: Option<&'static [&'static str]>,
}

const fn ring0(name: &'static str, ours: &'static [&'static str], theirs: &'static [&'static str]) -> Allowed {
    Allowed { name, ours, theirs: Some(theirs) }
}

const fn outside(name: &'static str, ours: &'static [&'static str]) -> Allowed {
    Allowed { name, ours, theirs: None }
}

/// What any crate's tests may use.
const FOR_TESTS: &[&str] = &["test-images", "test-kernels", "test-random"];

/// What the tests of a crate may use beside: the heap is tried with those it is for.
const TRIED_WITH: &[(&str, &[&str])] = &[("unikernel", &["console-backend", "store"])];

/// Every arrow of `hypervisor/ARCHITECTURE.md`.
const ARROWS: &[Allowed] = &[
    ring0("hypercall-abi", &[], &["bitflags", "zerocopy"]),
    ring0("hv-core", &["hypercall-abi"], &["bitflags", "heapless", "log", "spin", "zerocopy"]),
    ring0(
        "hv-machine",
        &["hv-core", "hypercall-abi"],
        &[
            "acpi",
            "bitflags",
            "elf",
            "heapless",
            "log",
            "multiboot2",
            "raw-cpuid",
            "spin",
            "uart_16550",
            "x86_64",
            "zerocopy",
        ],
    ),
    ring0("hypervisor", &["hv-core", "hv-machine", "hypercall-abi"], &["heapless", "log", "spin", "zerocopy"]),
    outside("guest-image", &["hypercall-abi"]),
    outside("ring-protocol", &["hypercall-abi"]),
    outside("unikernel", &["disk", "drivers", "hypercall-abi", "marker", "network", "ring-protocol"]),
    outside("store", &["hypercall-abi", "ring-protocol"]),
    outside("console-backend", &["hypercall-abi", "ring-protocol"]),
    outside("block-backend", &["device", "disk", "ring-protocol"]),
    outside("net-backend", &["device", "network", "ring-protocol"]),
    outside("xenbus-backend", &[]),
    outside("device", &[]),
    outside("disk", &["device"]),
    outside("network", &["device"]),
    outside("drivers", &["device", "disk", "network"]),
    outside("toolstack", &["console-backend", "guest-image", "hypercall-abi", "network", "ring-protocol"]),
    outside(
        "services",
        &[
            "block-backend",
            "console-backend",
            "disk",
            "drivers",
            "guest-image",
            "hypercall-abi",
            "net-backend",
            "network",
            "ring-protocol",
            "store",
            "toolstack",
            "xenbus-backend",
        ],
    ),
    outside(
        "dom0",
        &[
            "block-backend",
            "console-backend",
            "disk",
            "drivers",
            "guest-image",
            "hypercall-abi",
            "net-backend",
            "network",
            "ring-protocol",
            "services",
            "store",
            "toolstack",
            "unikernel",
        ],
    ),
    outside("guests", &["hypercall-abi", "ring-protocol", "unikernel"]),
    outside("sim", &["guest-image", "hv-core", "hypercall-abi", "ring-protocol"]),
    outside("boot", &["microbench", "test-random", "xtask"]),
    outside("test-images", &[]),
    outside("test-kernels", &[]),
    outside("test-random", &[]),
    outside("microbench", &["marker"]),
    outside("marker", &[]),
    outside("plugin", &["marker"]),
    outside("container-init", &[]),
    outside("shape", &[]),
    outside("xtask", &["container-init", "disk", "guest-image", "hypercall-abi", "marker", "microbench", "toolstack"]),
];

/// Arrows that are not drawn in the table.
pub(crate) fn check(crates: &[Crate]) -> Vec<String> {
    let names: Vec<&str> = crates.iter().map(|member| member.name.as_str()).collect();
    let mut found = Vec::new();
    for member in crates {
        let Some(allowed) = ARROWS.iter().find(|allowed| allowed.name == member.name) else {
            found.push(format!("{} has no line in the table of arrows (tests/shape/src/arrows.rs)", member.name));
            continue;
        };
        // Tests may use any tool of others, but no more of ours than the code itself, but for what is made for them.
        for (section, tools) in [("dependencies", false), ("build-dependencies", true), ("dev-dependencies", true)] {
            let table = member.manifest.get(section).and_then(toml::Value::as_table);
            for name in table.into_iter().flat_map(toml::Table::keys) {
                let tried =
                    TRIED_WITH.iter().any(|(tested, with)| *tested == member.name && with.contains(&name.as_str()));
                let fine = if names.contains(&name.as_str()) {
                    let for_tests = section == "dev-dependencies" && (tried || FOR_TESTS.contains(&name.as_str()));
                    for_tests || allowed.ours.contains(&name.as_str())
                } else {
                    tools || allowed.theirs.is_none_or(|theirs| theirs.contains(&name.as_str()))
                };
                if !fine {
                    found.push(format!("{} may not depend on {name} ([{section}] of its manifest)", member.name));
                }
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str, manifest: &str) -> Crate {
        let manifest = manifest.parse().unwrap();
        Crate { name: name.into(), folder: name.into(), manifest, files: Vec::new() }
    }

    #[test]
    fn an_arrow_that_is_not_drawn_is_found() {
        let good =
            member("hv-core", "[dependencies]\nhypercall-abi.workspace = true\n[dev-dependencies]\nproptest = '1'");
        let bad = member("hypercall-abi", "[dependencies]\nhv-core.workspace = true\nserde = '1'\nbitflags = '2'");
        let new = member("surprise", "");
        let found = check(&[good, bad, new]);
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(found[0].contains("hypercall-abi may not depend on hv-core"));
        assert!(found[1].contains("hypercall-abi may not depend on serde"));
        assert!(found[2].contains("surprise has no line"));
    }
}
